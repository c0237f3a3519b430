"""Ranks -> Hugging Face tensors: this rank's slices, a stream of whole tensors, or a directory."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.batch import Slice
from megalign.conversion.architecture import Architecture
from megalign.conversion.hf_writer import HfWriter
from megalign.conversion.names import Key
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups
from megalign.resharding.layout import LocalTensor, OwnedPiece, Plan, local_tensors, plan_of

_ALIGNMENT = 16  # a piece starts where any dtype may be viewed


def named_slices(chunks: Sequence[nn.Module], groups: ParallelGroups, architecture: Architecture) -> Iterator[Slice]:
    """This rank's part of the model, as views; over the ranks of a model copy every element comes once."""
    plan = plan_of(chunks, groups, architecture)
    local = local_tensors(chunks, groups, architecture)
    for name, owned in plan.tensors.items():
        for owner, key, _, piece in owned:
            if owner == groups.copy.rank:
                part = piece.turned(local[key].tensor[piece.shard_index])
                yield Slice(name, plan.shapes[name], piece.hf_index, part)


def gathered(
    chunks: Sequence[nn.Module],
    groups: ParallelGroups,
    architecture: Architecture,
    bucket_bytes: int = 128 << 20,
) -> Generator[tuple[str, Tensor], None, None]:
    """Whole tensors, bitwise, on every rank of the model copy; a tensor may be a view of a parameter.

    A collective over groups.copy: every rank must exhaust the iterator, or close it at the same tensor. One bucket is
    handed out while the next one travels, so at most about twice `bucket_bytes` (or twice the largest tensor) is held
    at a time, beside the buckets of which whoever reads it still keeps a tensor.
    """
    plan = plan_of(chunks, groups, architecture)
    local = local_tensors(chunks, groups, architecture)
    # Each starts when it is asked for: the next one travels while whoever reads the stream has the present one.
    buckets = (_Bucket(plan, names, local, groups) for names in split_into_buckets(plan, bucket_bytes))
    following = next(buckets)
    try:
        while following is not None:
            present = following  # lets go of the one before: two are held at most
            present.wait()
            following = next(buckets, None)
            yield from present.tensors()
    finally:
        if following is not None:
            following.wait()


def split_into_buckets(plan: Plan, bucket_bytes: int) -> list[list[str]]:
    """The plan's tensors, in order, in runs of at most `bucket_bytes`; a larger one is alone in its run."""
    buckets: list[list[str]] = []
    filled = bucket_bytes
    for name, owned in plan.tensors.items():
        size = sum(_nbytes(item) for item in owned)
        if filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled += size
    return buckets


@torch.no_grad()
def save_hf(
    path: str | os.PathLike[str],
    hf_source: str | os.PathLike[str],
    chunks: Sequence[nn.Module],
    groups: ParallelGroups,
    architecture: Architecture,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    config_changes: Mapping[str, Any] | None = None,
    special_tokens: Mapping[str, int] | None = None,
) -> None:
    """Writes the model, with the tokenizer and the (changed) config of `hf_source`; a collective over the world.

    One rank of the first model copy writes. If it cannot, every rank raises its UserError at the end.
    """
    plan_of(chunks, groups, architecture)  # what can be wrong with the model itself, every rank finds here
    error = None
    if groups.copy.ranks[0] == groups.world.ranks[0]:
        stream = gathered(chunks, groups, architecture)
        if groups.copy.rank == 0:
            options = {
                "dtype": dtype,
                "max_shard_size": max_shard_size,
                "config_changes": config_changes,
                "special_tokens": special_tokens,
            }
            error = _write(path, hf_source, stream, options)
        for _ in stream:  # the collectives of the writer's buckets, also of those that it had no room for
            pass
    told = [error]
    if groups.world.size > 1:
        dist.broadcast_object_list(told, src=groups.world.ranks[0], group=groups.world.group)
    if told[0] is not None:
        raise UserError(told[0])


def _write(
    path: str | os.PathLike[str],
    hf_source: str | os.PathLike[str],
    stream: Iterator[tuple[str, Tensor]],
    options: Mapping[str, Any],
) -> str | None:
    """The text of the error that stopped it, if any."""
    try:
        writer = HfWriter(path, hf_source, **options)
        for name, tensor in stream:
            writer.add(name, tensor)
        writer.close()
    except UserError as error:
        return str(error)
    return None


class _Bucket:
    """Tensors under way to every rank: each owner broadcasts one flat buffer of its pieces over the model copy."""

    def __init__(
        self, plan: Plan, names: Sequence[str], local: Mapping[Key, LocalTensor], groups: ParallelGroups
    ) -> None:
        self._owned = {name: plan.tensors[name] for name in names}
        self._shapes = plan.shapes
        self._works: list[dist.Work] = []
        owned = [item for items in self._owned.values() for item in items]
        mine = {
            number: local[item.key].tensor[item.piece.shard_index]
            for number, item in enumerate(owned)
            if item.owner == groups.copy.rank
        }
        if groups.copy.size == 1:
            self._parts = list(mine.values())
            return
        sizes: dict[int, int] = {}
        offsets = []
        for item in owned:
            offsets.append(sizes.get(item.owner, 0))
            sizes[item.owner] = offsets[-1] + -(-_nbytes(item) // _ALIGNMENT) * _ALIGNMENT
        device = next(iter(local.values())).tensor.device
        buffers = {owner: torch.empty(size, dtype=torch.uint8, device=device) for owner, size in sizes.items()}
        self._parts = [
            buffers[item.owner][offset : offset + _nbytes(item)].view(item.dtype).view(item.piece.shape)
            for item, offset in zip(owned, offsets, strict=True)
        ]
        for number, tensor in mine.items():
            self._parts[number].copy_(tensor)
        self._works = [
            dist.broadcast(buffer, src=groups.copy.ranks[owner], group=groups.copy.group, async_op=True)
            for owner, buffer in buffers.items()
        ]

    def wait(self) -> None:
        """On return (on a GPU: for what is put on its stream from now on) the tensors are here."""
        while self._works:
            self._works.pop(0).wait()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each one whole."""
        parts = iter(self._parts)
        for name, owned in self._owned.items():
            yield name, _assemble(self._shapes[name], [(item, next(parts)) for item in owned])


def _assemble(shape: tuple[int, ...], parts: list[tuple[OwnedPiece, Tensor]]) -> Tensor:
    """One whole tensor; a single part is it already, unless it lies otherwise there."""
    owned, tensor = parts[0]
    if len(parts) == 1 and tensor.shape == shape and not owned.piece.transposed:
        return tensor
    whole = tensor.new_empty(shape)
    for owned, tensor in parts:
        owned.piece.turned(whole[owned.piece.hf_index]).copy_(tensor)
    return whole


def _nbytes(owned: OwnedPiece) -> int:
    return torch.Size(owned.piece.shape).numel() * owned.dtype.itemsize
