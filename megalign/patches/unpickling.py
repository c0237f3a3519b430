"""torch's and Megatron's readers of torch_dist checkpoints, which unpickle whatever a file asks for.

`install()` of patches.megatron calls it: it is for every checkpoint that the process reads. Damage stays what it was,
what is refused is a UserError with the file's and the class's name.
"""

from __future__ import annotations

import functools
import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megalign.errors import UserError
from megalign.unpickle import load_data, read_metadata, refuse_classes


def unpickle_data_only() -> None:
    """Each goes when torch does the same.

    (1) FileSystemReader.read_metadata (torch 2.13, checkpoint/filesystem.py:930) is a plain pickle.load.
    (2) DefaultLoadPlanner.load_bytes (checkpoint/default_planner.py:387,390) says weights_only=False; Megatron's
    planners inherit it for extra states, random generators and, in 0.19, the common state.
    (3) FileSystemReader.read_data (:899) says weights_only=True and does not tell which file it was.
    """
    FileSystemReader.read_metadata = _read_metadata
    DefaultLoadPlanner.load_bytes = _load_bytes
    read_data = FileSystemReader.read_data

    @functools.wraps(read_data)
    def read_data_of_named_files(self: Any, plan: Any, planner: Any) -> Any:
        try:
            return read_data(self, plan, planner)
        except pickle.UnpicklingError as error:
            for item in plan.items:
                info = self.storage_data[item.storage_index]
                file = Path(self.path) / info.relative_path
                with file.open("rb") as opened:
                    opened.seek(info.offset)
                    refuse_classes(io.BytesIO(opened.read(info.length)), f"{file} ({item.storage_index.fqn})", error)
            raise

    FileSystemReader.read_data = read_data_of_named_files


def refusal_in(error: CheckpointException) -> UserError | None:
    """What torch.distributed.checkpoint collected from the ranks, if a refusal is among it."""
    found = [failure for failure, _ in error.failures.values() if isinstance(failure, UserError)]
    return found[0] if found else None


def _read_metadata(self: Any, *args: Any, **kwargs: Any) -> Metadata:
    metadata = read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    name = read_item.dest_index.fqn
    info = (self.metadata.storage_data or {}).get(read_item.storage_index)
    loaded = load_data(value, name if info is None else f"{info.relative_path} ({name})")
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
