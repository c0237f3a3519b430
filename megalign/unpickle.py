"""Reads what others pickled without running any of it: a checkpoint may have been downloaded.

Three ways, from strict to blind: torch's own `weights_only`, an allow-list for torch_dist's `.metadata`, and objects
without behaviour for what programs note of themselves in a checkpoint (Megatron-LM its whole command line).
"""

from __future__ import annotations

import collections
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from megalign.errors import UserError

METADATA_FILE = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_DTYPES = sorted(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
# Whole names: one with a dot in it would reach into what is allowed, and from there anywhere.
_METADATA_GLOBALS = {
    **dict.fromkeys(
        (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        f"{_CHECKPOINT}metadata",
    ),
    **dict.fromkeys(("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"), f"{_CHECKPOINT}planner"),
    **dict.fromkeys(("_StorageInfo", "_StoragePrefix"), f"{_CHECKPOINT}filesystem"),
    **dict.fromkeys(("Size", *_DTYPES), "torch"),
    "_get_layout": "torch.serialization",
    "PosixPath": "pathlib",  # where the writer had the directory
    "OrderedDict": "collections",
}
_PLACES = {"pathlib._local": "pathlib"}  # where Python 3.13 has the same classes
# Only their names are read, no such class is ever imported.
_KNOWN_PACKAGES = ("argparse", "types", "enum", "signal", "pathlib", "numpy", "torch", "megatron")
# What zip archives and unpicklers answer bytes that mean nothing with, by the place at which they meet them.
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, EOFError, OSError),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError),
)
_PLAIN = {"set": set, "frozenset": frozenset, "slice": slice, "complex": complex, "bytearray": bytearray}


def read_metadata(path: Path) -> Metadata:
    """The content of a torch_dist checkpoint's `.metadata`; a class that has no business there is refused."""
    with path.open("rb") as file:
        metadata = _MetadataUnpickler(file, path).load()
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} holds a {type(metadata).__name__} and no Metadata; give a torch_dist checkpoint")
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(
                f"{path} names the file {info.relative_path!r}, which is not beside it; use a checkpoint that names "
                "files of its own"
            )
    return metadata


def refuse_classes_in_metadata(path: Path) -> None:
    """Raises as `read_metadata` does for what it refuses; damage is for the reader that comes after to tell."""
    try:
        read_metadata(path)
    except UserError:
        raise
    except DAMAGED:
        return


def load_data(stream: IO[bytes], name: str, **options: Any) -> Any:
    """torch.load of tensors and plain values; a class is refused. `name` is what the error calls the stream."""
    try:
        return torch.load(stream, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        refuse_classes(stream, name, error)
        raise


def refuse_classes(stream: IO[bytes], name: str, error: BaseException) -> None:
    """A UserError with the classes that torch.load would not have; none for what is merely damaged."""
    try:
        stream.seek(0)
        unsafe = get_unsafe_globals_in_checkpoint(stream)
    except DAMAGED:  # no archive, but a bare pickle, of which torch.load names the first
        unsafe = re.findall(r"GLOBAL (\S+) was not an allowed", str(error))
    if unsafe:
        raise UserError(_refusal(name, ", ".join(unsafe))) from error


def read_inert(stream: IO[bytes], name: str) -> Any:
    """What torch.save wrote, with tensors and objects of known packages as inert stand-ins that keep their state."""
    with zipfile.ZipFile(stream) as archive:
        (pickled,) = (entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
        with archive.open(pickled) as file:
            return _InertUnpickler(file, name).load()


@contextmanager
def damage_told(name: str) -> Iterator[None]:
    """Turns what the functions above raise for a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except DAMAGED as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} is damaged ({reason}); copy the checkpoint again, or use another") from error


class Inert:
    """An object of which only what was pickled is known, as attributes where it has names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        place = _PLACES.get(module, module)
        if _METADATA_GLOBALS.get(name) != place:
            raise UserError(_refusal(str(self._path), f"{module}.{name}"))
        return super().find_class(place, name)


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], name: str) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _PLAIN:  # the second is torch.save's
            return _PLAIN[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module.partition(".")[0] not in _KNOWN_PACKAGES:
            raise UserError(_refusal(self._name, f"{module}.{name}"))
        return type(name.rpartition(".")[2], (Inert,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Inert:
        return Inert(*pid)  # a tensor's numbers


def _refusal(name: str, classes: str) -> str:
    return (
        f"{name} asks for {classes}, which a checkpoint's data does not need and which could run anything: it is not "
        "loaded; use a checkpoint from a source that you trust"
    )
