"""Who holds what: the local Megatron tensors by global name, and the plan that is equal on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import rules_of
from megalign.conversion.names import canonical
from megalign.conversion.rules import Piece, Rule, expand, hf_shapes, layer_name, pieces, shard_shape
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups

Key = tuple[str, int | None]  # (canonical pattern, global layer)


class LocalTensor(NamedTuple):
    """One Megatron parameter of this rank and what it is made of."""

    rule: Rule
    tensor: Tensor
    pieces: list[Piece]


class Holder(NamedTuple):
    """What one rank of a model copy told the others."""

    tp_rank: int
    pp_rank: int
    dtypes: dict[Key, torch.dtype]


class OwnedPiece(NamedTuple):
    """A piece and the one rank of the model copy (index into groups.mp.ranks) that gives it."""

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
    for chunk in chunks:
        layers = chunk.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            key = canonical(name, first_layer)
            assert key not in found, f"{key} stands twice on this rank"
            found[key] = parameter.detach()
    tensors = {}
    for rule, layer in expand(rules_of(architecture), architecture):
        key = (rule.megatron, layer)
        if key in found:
            tensors[key] = _local_tensor(rule, layer, found.pop(key), groups, architecture)
    if found:
        names = ", ".join(layer_name(*key) for key in found)
        raise UserError(f"{architecture.family} has no rule for Megatron's {names}; write it in megalign/conversion")
    return tensors


def plan_of(chunks: Sequence[nn.Module], groups: ParallelGroups, architecture: Architecture) -> Plan:
    """The plan of a model; the first call gathers names and dtypes over the model copy."""
    if chunks[0] not in _PLANS:
        _PLANS[chunks[0]] = make_plan(gather_holders(chunks, groups, architecture), architecture)
    return _PLANS[chunks[0]]


def gather_holders(chunks: Sequence[nn.Module], groups: ParallelGroups, architecture: Architecture) -> list[Holder]:
    """What every rank of the model copy holds, in the order of groups.mp.ranks."""
    local = local_tensors(chunks, groups, architecture)
    mine = Holder(groups.tp.rank, groups.pp.rank, {key: item.tensor.dtype for key, item in local.items()})
    if groups.mp.size == 1:
        return [mine]
    holders: list[Holder | None] = [None] * groups.mp.size
    dist.all_gather_object(holders, mine, group=groups.mp.group)
    return holders


def make_plan(holders: Sequence[Holder], architecture: Architecture) -> Plan:
    """Assigns each piece one owner; raises when the ranks together do not hold the whole model, once."""
    rules = rules_of(architecture)
    tp_size = 1 + max(holder.tp_rank for holder in holders)
    shapes = hf_shapes(rules, architecture)
    tensors: dict[str, list[OwnedPiece]] = {name: [] for name in shapes}
    missing = []
    for rule, layer in expand(rules, architecture):
        if rule.duplicate:
            continue
        key = (rule.megatron, layer)
        owners = [(index, holder) for index, holder in enumerate(holders) if key in holder.dtypes]
        if not owners:
            missing.append(layer_name(*key))
            continue
        assert sorted(holder.tp_rank for _, holder in owners) == list(range(tp_size)), f"{key}: {owners}"
        for index, holder in owners:
            if rule.dim is None and holder.tp_rank > 0:
                continue
            for piece in pieces(rule, architecture, layer=layer, tp_rank=holder.tp_rank, tp_size=tp_size):
                tensors[piece.hf_name].append(OwnedPiece(index, key, holder.dtypes[key], piece))
    if missing:
        names = ", ".join(missing)
        raise UserError(f"no rank holds Megatron's {names}; build the model from the same config.json")
    for name, owned in tensors.items():
        assert _numel(owned) == torch.Size(shapes[name]).numel(), f"the pieces of {name} do not cover it"
    return Plan(tensors, shapes)


def _local_tensor(
    rule: Rule, layer: int | None, tensor: Tensor, groups: ParallelGroups, architecture: Architecture
) -> LocalTensor:
    expected = shard_shape(rule, architecture, groups.tp.size)
    if tuple(tensor.shape) != expected:
        raise UserError(
            f"Megatron's {layer_name(rule.megatron, layer)} is {list(tensor.shape)}, its rule wants "
            f"{list(expected)} at tensor_model_parallel_size={groups.tp.size}; build the model from the same "
            "config.json"
        )
    cut = pieces(rule, architecture, layer=layer, tp_rank=groups.tp.rank, tp_size=groups.tp.size)
    return LocalTensor(rule, tensor, cut)


def _numel(owned: Iterable[OwnedPiece]) -> int:
    return sum(torch.Size(item.piece.shape).numel() for item in owned)
