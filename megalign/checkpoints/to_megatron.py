"""A Hugging Face directory -> torch_dist chunks under Megatron's names, each made when it is written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from megalign.checkpoints.raw import FileRun, SafetensorsRuns
from megalign.checkpoints.stored import places
from megalign.checkpoints.to_hf import KEPT_IN_FP32
from megalign.checkpoints.writer import Chunk
from megalign.conversion.architecture import Architecture
from megalign.conversion.families import rules_of
from megalign.conversion.hf_files import HfReader
from megalign.conversion.rules import Piece, Rule, expand, pieces, rows_of, shard_shape
from megalign.errors import UserError

_MAX_CHUNK_BYTES = 256 << 20  # so that an embedding of gigabytes is never whole in memory


def chunks_of(reader: HfReader, architecture: Architecture, dtype: torch.dtype | None) -> Iterator[Chunk]:
    """Every tensor of the model as chunks, in the order of the Hugging Face tensors. Rows split, columns never."""
    runs = SafetensorsRuns(reader)
    for rule, key in expand(rules_of(architecture), architecture):
        if rule.duplicate:
            continue
        made_of = pieces(rule, architecture, indices=key.indices, tp_rank=0, tp_size=1)
        shape = shard_shape(rule, architecture, 1)
        kept = _dtype(reader, rule, made_of, dtype)
        for place in places(rule, key, architecture):
            front = len(place.index)
            for first, end in _blocks(shape, kept, made_of):
                yield Chunk(
                    name=place.name,
                    size=(*place.sizes, *shape),
                    dtype=kept,
                    offsets=(*place.index, first, *(0 for _ in shape[1:])),
                    sizes=(*(1 for _ in range(front)), end - first, *shape[1:]),
                    make=partial(_made, reader, made_of, (first, end), shape, kept, front),
                    source=_source(runs, reader, made_of, (first, end), kept),
                )


def _dtype(reader: HfReader, rule: Rule, made_of: list[Piece], wanted: torch.dtype | None) -> torch.dtype:
    if rule.megatron.endswith(KEPT_IN_FP32) and wanted is not None:
        return torch.float32
    if wanted is not None:
        return wanted
    found = {name: reader.dtype(name) for name in {piece.hf_name for piece in made_of}}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name} is {dtype}" for name, dtype in sorted(found.items()))
        raise UserError(f"{told}, and they are one tensor in Megatron; say with --dtype which it shall be")
    return next(iter(found.values()))


def _blocks(shape: tuple[int, ...], dtype: torch.dtype, made_of: list[Piece]) -> Iterator[tuple[int, int]]:
    """Runs of rows: no larger than a chunk may be, and apart where the halves of a fused projection meet."""
    rows = shape[0]
    row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
    step = max(1, _MAX_CHUNK_BYTES // row_bytes)
    ends = {piece.shard_index[0].stop for piece in made_of} if len(made_of) == 2 else set()
    cuts = sorted({0, rows, *range(0, rows, step), *ends})
    yield from zip(cuts[:-1], cuts[1:], strict=True)


def _source(
    runs: SafetensorsRuns, reader: HfReader, made_of: list[Piece], rows: tuple[int, int], dtype: torch.dtype
) -> FileRun | None:
    """The rows' bytes in a file, where they stand there as they are to be written."""
    parts = [part for piece in made_of if (part := rows_of(piece, *rows)) is not None]
    if len(parts) != 1 or reader.dtype(parts[0].hf_name) is not dtype:
        return None
    return runs.run_of(parts[0], dtype.itemsize)


def _made(
    reader: HfReader,
    made_of: list[Piece],
    rows: tuple[int, int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    front: int,
) -> Tensor:
    """The rows of the tensor; a view of the file where they are one piece of it."""
    first, end = rows
    parts = [part for piece in made_of if (part := rows_of(piece, first, end)) is not None]
    if len(parts) == 1:
        whole = parts[0].turned(reader.read(parts[0].hf_name, parts[0].hf_index)).to(dtype)
    else:
        whole = torch.empty((end - first, *shape[1:]), dtype=dtype)
        for part in parts:
            whole[part.shard_index].copy_(part.turned(reader.read(part.hf_name, part.hf_index)))
    return whole[(None,) * front]
