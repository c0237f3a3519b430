"""safetensors files whose tensors are written one after the other: names, shapes and dtypes are known before."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megalign.checkpoints.raw import FileRun, send
from megalign.conversion.hf_files import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """In order, files of at most `max_bytes`; a larger tensor has one for itself."""
    shards: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not shards or filled + entry.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def write_shard(
    file: Path,
    entries: Sequence[Entry],
    blocks: Callable[[str], list[Tensor]],
    written: Callable[[int], None],
    run_of: Callable[[Tensor], FileRun | None] = lambda block: None,
) -> None:
    """One file; `blocks` gives each tensor, as runs of its rows, when its turn comes.

    `run_of` says where the bytes of a block that is a view of a file are.
    """
    # As safetensors does: wider numbers first, so that all are aligned.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with file.open("wb") as stream:
        stream.write(_header(entries))
        for entry in entries:
            start = stream.tell()
            for block in blocks(entry.name):
                assert block.dtype is entry.dtype, entry.name
                run = run_of(block)
                if run is not None:
                    send(run, stream)
                    continue
                stream.write(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))
            assert stream.tell() - start == entry.nbytes, entry.name
            written(entry.nbytes)
        stream.flush()
        os.fsync(stream.fileno())


def _header(entries: Sequence[Entry]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in entries:
        size = math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
