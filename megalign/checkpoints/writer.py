"""Writes torch_dist through torch's checkpoint planner, whose tensors are made when they are written.

torch's own FileSystemWriter keeps every tensor of a file until the file is closed (filesystem.py:452), and Megatron's
all of a rank's from the start; here one is alive at a time.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from megalign.checkpoints.raw import FileRun, send
from megalign.checkpoints.reader import COMMON_FILE, CONFIG_FILE, numbers_in
from megalign.unpickle import METADATA_FILE

_MAX_FILE_BYTES = 4 << 30
_ALIGNMENT = 64  # where torch.save aligns tensors inside its archive
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_CONFIG |= {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor: where it belongs, and how its numbers are made."""

    name: str
    size: tuple[int, ...]  # of the whole tensor, axes in front included
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    make: Callable[[], Tensor]
    source: FileRun | None = None  # its bytes, where a file has them as they are

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def write_checkpoint(
    path: Path,
    chunks: Sequence[Chunk],
    objects: Sequence[str],
    common: dict[str, Any],
    written: Callable[[int], None],
) -> None:
    """Writes this rank's share of the chunks; rank 0 also the objects, all without content, and the common state.

    A collective. `written` is told of bytes. The directory looks whole when the last file, metadata.json, is there.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    crc = get_crc32_options()
    # Two thirds of torch.save's time, and nothing reads them: torch.load does not.
    set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is enough
            dcp.save({}, storage_writer=_Writer(path), planner=_Planner(chunks, objects, written), no_dist=alone)
    except CheckpointException as error:  # of all ranks; no Exception
        failure, _ = next(iter(error.failures.values()))
        raise failure from error
    finally:
        set_crc32_options(crc)
    if alone or dist.get_rank() == 0:
        torch.save(common, path / COMMON_FILE)
        (path / CONFIG_FILE).write_text(json.dumps(_CONFIG))


class _Planner(SavePlanner):
    """What a rank writes, and, when a tensor's turn comes, the tensor."""

    def __init__(self, chunks: Sequence[Chunk], objects: Sequence[str], written: Callable[[int], None]) -> None:
        self._chunks = {(chunk.name, chunk.offsets): chunk for chunk in chunks}
        self._objects, self._written = objects, written

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """The state dict is empty: no tensor is resident."""
        self._is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """This rank's items."""
        items = [_tensor_item(chunk) for chunk in self._chunks.values()]
        if self._is_coordinator:
            items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Not torch's own, which compares all chunks of a tensor pair by pair: thirty thousand experts have as many."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to change."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Makes the tensor; it is the caller's alone."""
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)
            return content
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset)]
        self._written(chunk.nbytes)
        if chunk.source is not None:
            return torch.empty(chunk.sizes, dtype=chunk.dtype)  # pages that nothing touches are no memory
        tensor = chunk.make()
        assert (tuple(tensor.shape), tensor.dtype) == (chunk.sizes, chunk.dtype), f"{chunk.name}: {tensor.shape}"
        return _alone_in_its_storage(tensor)

    def source_of(self, write_item: WriteItem) -> FileRun | None:
        """The file's bytes that stand for what `resolve_data` gives."""
        if write_item.type == WriteItemType.BYTE_IO:
            return None
        return self._chunks[write_item.index.fqn, tuple(write_item.index.offset)].source


class _Writer(StorageWriter):
    """Files of a few gigabytes for each rank, and `.metadata`."""

    def __init__(self, path: Path) -> None:
        self._path, self._rank = path, 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between calls."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The directory is there: whoever renames it at the end has made it."""
        self._rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to add."""
        return plans

    def write_data(self, plan: SavePlan, planner: _Planner) -> Future[list[WriteResult]]:
        """Item after item, each forgotten before the next is made."""
        results, items, number = [], list(plan.items), 0
        while items:
            file = f"__{self._rank}_{number}.distcp"
            with open(self._path / file, "w+b") as stream:
                while items and stream.tell() < _MAX_FILE_BYTES:
                    results.append(_write(items.pop(0), planner, stream, file))
                stream.flush()
                os.fsync(stream.fileno())
            number += 1
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0 notes where everything is, as FileSystemWriter does."""
        metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
        metadata.storage_meta = StorageMeta()
        with open(self._path / METADATA_FILE, "wb") as file:
            pickle.dump(metadata, file)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Asked for where torch chooses a writer; this one is chosen."""
        return True


def _write(item: WriteItem, planner: _Planner, stream: Any, file: str) -> WriteResult:
    stream.seek(-(-stream.tell() // _ALIGNMENT) * _ALIGNMENT)
    offset, source = stream.tell(), planner.source_of(item)
    data = planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
    elif source is None:
        torch.save(data, stream)
    else:
        with skip_data():  # torch.save leaves a gap where the numbers belong
            torch.save(data, stream)
    end = stream.tell()
    if source is not None:
        _fill(stream, offset, end, source)
    return WriteResult(item.index, end - offset, _StorageInfo(file, offset, end - offset))


def _fill(stream: Any, offset: int, end: int, source: FileRun) -> None:
    """Puts a file's bytes into the gap of the archive at offset:end, and stands behind it again."""
    stream.flush()
    # Its header and its directory at the end are all that is read of it.
    with mmap.mmap(stream.fileno(), end, access=mmap.ACCESS_READ) as mapped, memoryview(mapped)[offset:end] as window:
        start, nbytes = numbers_in(window, stream.name)
    assert nbytes == source.nbytes, f"{stream.name} at {offset}: {nbytes} {source}"
    stream.seek(offset + start)
    send(source, stream)
    stream.seek(end)


def _tensor_item(chunk: Chunk) -> WriteItem:
    properties = TensorProperties(dtype=chunk.dtype)
    part = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
    return WriteItem(
        MetadataIndex(chunk.name, chunk.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(part, properties, torch.Size(chunk.size)),
    )


def _alone_in_its_storage(tensor: Tensor) -> Tensor:
    """torch.save writes the whole storage of a view: a view of a mapped file gets one of its own size, not copied."""
    tensor = tensor.contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    raw = torch.from_numpy(tensor.view(torch.uint8).numpy())
    return raw.view(tensor.dtype)
