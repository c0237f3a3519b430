"""A torch_dist directory read without Megatron: names and shapes from `.metadata`, tensors as views of its files.

Files are mapped, not read: what is copied out of a view is all the memory that a tensor takes.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import mmap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megalign.checkpoints.raw import FileRun
from megalign.errors import UserError
from megalign.unpickle import METADATA_FILE, damage_told, load_data, read_inert, read_metadata

CONFIG_FILE = "metadata.json"  # what makes a directory a checkpoint for Megatron
COMMON_FILE = "common.pt"
# Since 0.17 Megatron keeps it among the sharded objects.
_COMMON_OBJECT = "common_state/shard_0_1"


class Part(NamedTuple):
    """A piece of a tensor, as one file has it: where it belongs in the region that was asked for, and its numbers."""

    index: tuple[slice, ...]
    view: Tensor


class TorchDistReader:
    """The tensors of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with damage_told(str(path / METADATA_FILE)):
            self._metadata = read_metadata(path / METADATA_FILE)
        found = self._metadata.state_dict_metadata.items()
        self._tensors = {name: entry for name, entry in found if isinstance(entry, TensorStorageMetadata)}
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._files: dict[str, mmap.mmap] = {}
        self._begins: list[tuple[int, int, IO[bytes]]] = []  # address and length of each mapped file
        self._opened = functools.lru_cache(maxsize=256)(self._open)

    def names(self) -> list[str]:
        """Every tensor, the optimizer's included."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, with the axes of layers and experts."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype."""
        return self._tensors[name].properties.dtype

    def num_chunks(self, name: str) -> int:
        """In how many pieces it was written."""
        return len(self._tensors[name].chunks)

    def common(self) -> Any:
        """What the program noted beside the tensors, with inert stand-ins for its objects; {} where there is nothing.

        Of Megatron-LM: `iteration`, and `args` with its options as attributes.
        """
        file = self.path / COMMON_FILE
        if file.exists():
            with damage_told(str(file)), file.open("rb") as stream:
                return read_inert(stream, str(file))
        info = self._metadata.storage_data.get(MetadataIndex(_COMMON_OBJECT))
        if info is None:
            return {}
        told = f"{self.path / info.relative_path} ({_COMMON_OBJECT})"
        with damage_told(told):
            return read_inert(io.BytesIO(self._window(info)), told)[0]

    def parts(self, name: str, index: tuple[int, ...], region: tuple[slice, ...]) -> Iterator[Part]:
        """What files have of tensor[index][region], as views."""
        for chunk in self._chunks_at(name, index):
            front = len(index)
            mine, theirs = [], []
            for wanted, offset, size in zip(region, chunk.offsets[front:], chunk.sizes[front:], strict=True):
                first, end = max(wanted.start, offset), min(wanted.stop, offset + size)
                mine.append(slice(first - wanted.start, end - wanted.start))
                theirs.append(slice(first - offset, end - offset))
            if all(part.start < part.stop for part in mine):
                inner = tuple(at - offset for at, offset in zip(index, chunk.offsets[:front], strict=True))
                yield Part(
                    tuple(mine), self._opened(name, tuple(chunk.offsets), tuple(chunk.sizes))[inner][tuple(theirs)]
                )

    def run_of(self, view: Tensor) -> FileRun | None:
        """The bytes of a view in the file that it is of; None where they are not one run."""
        if view.is_contiguous():
            for begin, length, file in self._begins:
                if begin <= view.data_ptr() < begin + length:
                    return FileRun(file, view.data_ptr() - begin, view.nbytes)
        return None

    def _chunks_at(self, name: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        if name not in self._chunks:
            table: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self._tensors[name].chunks:
                spans = zip(chunk.offsets[: len(index)], chunk.sizes[: len(index)], strict=True)
                for at in itertools.product(*(range(offset, offset + size) for offset, size in spans)):
                    table.setdefault(at, []).append(chunk)
            self._chunks[name] = table
        return self._chunks[name].get(index, [])

    def _open(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A chunk as a view of its file. torch.load tells dtype and strides, and does not read the numbers."""
        info = self._metadata.storage_data.get(MetadataIndex(name, torch.Size(offsets)))
        if info is None:
            place = f"{name} at {list(offsets)}"
            raise UserError(f"{self.path / METADATA_FILE} does not say where {place} is; copy it again")
        told = f"{self.path / info.relative_path} ({name} at {list(offsets)})"
        with damage_told(told):
            window = self._window(info)
            shape = load_data(io.BufferedReader(_Window(window)), told, map_location="meta")
        if not isinstance(shape, Tensor) or (tuple(shape.shape), shape.dtype) != (sizes, self.dtype(name)):
            raise UserError(
                f"{told} is not {list(sizes)} of {self.dtype(name)}, as {METADATA_FILE} says; copy it again"
            )
        with damage_told(told):
            start, length = numbers_in(window, told)
        mapped, count = self._mapped(info.relative_path), length // shape.itemsize
        numbers = torch.frombuffer(mapped, dtype=shape.dtype, count=count, offset=info.offset + start)
        with damage_told(told):  # strides beyond the numbers
            return numbers.as_strided(shape.shape, shape.stride(), shape.storage_offset())

    def _window(self, info: Any) -> memoryview:
        mapped = self._mapped(info.relative_path)
        if info.offset + info.length > len(mapped):
            raise UserError(f"{self.path / info.relative_path} is cut off at {len(mapped)} bytes; copy it again")
        return memoryview(mapped)[info.offset : info.offset + info.length]

    def _mapped(self, file: str) -> mmap.mmap:
        if file not in self._files:
            path = self.path / file
            try:
                opened = path.open("rb")  # for as long as the conversion
                # Private and writable, else torch warns of each view; nothing writes.
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}); copy the checkpoint again") from error
            self._files[file] = mapped
            self._begins.append((torch.frombuffer(mapped, dtype=torch.uint8).data_ptr(), len(mapped), opened))
        return self._files[file]


class _Window(io.RawIOBase):
    """A file's part as a file, without a copy."""

    def __init__(self, window: memoryview) -> None:
        self._window, self._at = window, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._window)}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        read = self._window[self._at : self._at + len(buffer)]
        buffer[: len(read)] = read
        self._at += len(read)
        return len(read)


def numbers_in(window: memoryview, told: str) -> tuple[int, int]:
    """Where in torch.save's archive a tensor's bytes begin, and how many they are."""
    with zipfile.ZipFile(io.BufferedReader(_Window(window))) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{told} is not what torch.save writes of one tensor; copy it again")
    (entry,) = entries
    header = entry.header_offset
    # Of the entry's own header, whose extra field torch fills up to an aligned begin.
    name, extra = (int.from_bytes(window[header + at : header + at + 2], "little") for at in (26, 28))
    return header + 30 + name + extra, entry.file_size


def numel(shape: tuple[int, ...]) -> int:
    """Numbers in a tensor of that shape."""
    return math.prod(shape)
