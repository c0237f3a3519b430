"""Who holds what: local Megatron tensors by global name, and the plan that is equal on every rank of a model copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import rules_of
from megalign.conversion.names import Key, canonical
from megalign.conversion.rules import Piece, Rule, expand, hf_shapes, pieces, shard_shape
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups


class LocalTensor(NamedTuple):
    """One Megatron parameter of this rank and what it is made of."""

    rule: Rule
    tensor: Tensor
    pieces: list[Piece]


class Holder(NamedTuple):
    """What one rank of a model copy told the others."""

    tp_rank: int
    etp_rank: int
    dtypes: dict[Key, torch.dtype]

    def shard_of(self, rule: Rule) -> int:
        """Which shard of the rule's tensors it holds."""
        return self.etp_rank if rule.per_expert else self.tp_rank


class OwnedPiece(NamedTuple):
    """A piece and the one rank of the model copy (index into groups.copy.ranks) that gives it."""

    owner: int
    key: Key
    dtype: torch.dtype
    piece: Piece


@dataclass(frozen=True)
class Plan:
    """Every Hugging Face tensor of the model, in order, as owned pieces; the same on every rank of a copy."""

    tensors: dict[str, list[OwnedPiece]]
    shapes: dict[str, tuple[int, ...]]


# Parameters keep their names and dtypes for a model's life, so its plan is made once.
_PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def local_tensors(
    chunks: Sequence[nn.Module], groups: ParallelGroups, architecture: Architecture
) -> dict[Key, LocalTensor]:
    """This rank's parameters, in the order of the Hugging Face tensors; raises for one that no rule knows."""
    found: dict[Key, Tensor] = {}
    for key, tensor in _named_tensors(chunks, groups, architecture):
        assert key not in found, f"{key} stands twice on this rank"
        found[key] = tensor.detach()
    tensors = {}
    for rule, key in expand(rules_of(architecture), architecture):
        if key in found:
            tensors[key] = _local_tensor(rule, key, found.pop(key), groups, architecture)
    if found:
        names = ", ".join(key.name for key in found)
        raise UserError(f"{architecture.family} has no rule for Megatron's {names}; write it in megalign/conversion")
    return tensors


def plan_of(chunks: Sequence[nn.Module], groups: ParallelGroups, architecture: Architecture) -> Plan:
    """The plan of a model; the first call gathers names and dtypes over the model copy."""
    if chunks[0] not in _PLANS:
        _PLANS[chunks[0]] = make_plan(gather_holders(chunks, groups, architecture), architecture)
    return _PLANS[chunks[0]]


def gather_holders(chunks: Sequence[nn.Module], groups: ParallelGroups, architecture: Architecture) -> list[Holder]:
    """What every rank of the model copy holds, in the order of groups.copy.ranks."""
    local = local_tensors(chunks, groups, architecture)
    mine = Holder(groups.tp.rank, groups.etp.rank, {key: item.tensor.dtype for key, item in local.items()})
    if groups.copy.size == 1:
        return [mine]
    holders: list[Holder | None] = [None] * groups.copy.size
    dist.all_gather_object(holders, mine, group=groups.copy.group)
    return holders


def make_plan(holders: Sequence[Holder], architecture: Architecture) -> Plan:
    """Assigns each piece one owner, the first that holds it; raises when the ranks together lack some."""
    rules = rules_of(architecture)
    shapes = hf_shapes(rules, architecture)
    tensors: dict[str, list[OwnedPiece]] = {name: [] for name in shapes}
    missing = []
    for rule, key in expand(rules, architecture):
        if rule.duplicate:
            continue
        size = 1 + max(holder.shard_of(rule) for holder in holders)
        owners: dict[int, int] = {}  # shard -> the first rank that holds it
        for index, holder in enumerate(holders):
            if key in holder.dtypes:
                owners.setdefault(holder.shard_of(rule), index)
        if not owners:
            missing.append(key.name)
            continue
        assert sorted(owners) == list(range(size)), f"{key}: {owners}"
        for shard in [0] if rule.dim is None else range(size):
            index = owners[shard]
            for piece in pieces(rule, architecture, indices=key.indices, tp_rank=shard, tp_size=size):
                tensors[piece.hf_name].append(OwnedPiece(index, key, holders[index].dtypes[key], piece))
    if missing:
        names = ", ".join(missing)
        raise UserError(f"no rank holds Megatron's {names}; build the model from the same config.json")
    for name, owned in tensors.items():
        assert _numel(owned) == torch.Size(shapes[name]).numel(), f"the pieces of {name} do not cover it"
    return Plan(tensors, shapes)


def _named_tensors(
    chunks: Sequence[nn.Module], groups: ParallelGroups, architecture: Architecture
) -> Iterator[tuple[Key, Tensor]]:
    """Parameters, and buffers that a rule knows, with their keys."""
    buffers = {rule.megatron for rule in rules_of(architecture)}
    first_expert = groups.ep.rank * (architecture.num_experts // groups.ep.size)
    for chunk in chunks:
        layers = chunk.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            yield canonical(name, first_layer, first_expert), parameter
        for name, buffer in chunk.named_buffers():
            key = canonical(name, first_layer, first_expert)
            if key.pattern in buffers:
                yield key, buffer


def _local_tensor(
    rule: Rule, key: Key, tensor: Tensor, groups: ParallelGroups, architecture: Architecture
) -> LocalTensor:
    axis = groups.etp if rule.per_expert else groups.tp
    expected = shard_shape(rule, architecture, axis.size)
    if tuple(tensor.shape) != expected:
        raise UserError(
            f"Megatron's {key.name} is {list(tensor.shape)}, its rule wants {list(expected)} on one of {axis.size} "
            "(expert) tensor-parallel ranks; build the model from the same config.json"
        )
    return LocalTensor(
        rule, tensor, pieces(rule, architecture, indices=key.indices, tp_rank=axis.rank, tp_size=axis.size)
    )


def _numel(owned: Iterable[OwnedPiece]) -> int:
    return sum(torch.Size(item.piece.shape).numel() for item in owned)
