"""Hugging Face directories: HfReader reads slices of safetensors files, config files as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalign.errors import UserError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a model directory's config.json."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"model directory {str(path)!r} does not exist; give a local Hugging Face directory")
    return read_json(directory / CONFIG_FILE)


class HfReader:
    """The tensors of a model directory; only headers are read until a slice is asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = read_config(path)
        self._files: dict[str, Any] = {}  # tensor name -> its open file
        self._paths: dict[str, Path] = {}
        for file, names in self._list_files().items():
            opened = _open(self.path / file)
            keys = set(opened.keys())
            absent = sorted((names or keys) - keys)
            if absent:
                raise UserError(f"{self.path / file} lacks {listing(absent)}, which {INDEX_FILE} promises")
            self._files.update(dict.fromkeys(names or keys, opened))
            self._paths.update(dict.fromkeys(names or keys, self.path / file))

    def names(self) -> list[str]:
        """Every tensor of the directory."""
        return list(self._files)

    def file_of(self, name: str) -> Path:
        """Which file has a tensor."""
        return self._paths[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, from the file's header."""
        found = self._files[name].get_slice(name).get_dtype()
        if found not in SAFETENSORS_DTYPES:
            raise UserError(f"{name} in {self.path} is {found}, which megalign does not read; save it in BF16")
        return SAFETENSORS_DTYPES[found]

    def read(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """hf[index], reading no more of the file than that and what steps skip; in the file's dtype, on the CPU."""
        # Not every version of safetensors reads steps.
        block = tuple(slice(part.start, part.stop) if isinstance(part, slice) else part for part in index)
        steps = tuple(slice(None, None, part.step) for part in index if isinstance(part, slice))  # numbers leave no dim
        return self._files[name].get_slice(name)[block][steps]

    def check(self, expected: Mapping[str, tuple[int, ...]], *, ignored: set[str]) -> None:
        """Raises when the directory's tensors are not exactly those expected, or are of another shape."""
        present = {name for name in self.names() if name in expected or not _is_ignored(name, ignored)}
        faults = {
            "missing": sorted(expected.keys() - present),
            "unexpected": sorted(present - expected.keys()),
            "mis-shaped": [
                f"{name} {list(self.shape(name))} instead of {list(shape)}"
                for name, shape in expected.items()
                if name in present and self.shape(name) != shape
            ],
        }
        told = [f"{fault} tensors: {listing(names)}" for fault, names in faults.items() if names]
        if told:
            raise UserError(f"{self.path} does not fit its config.json; {'; '.join(told)}")

    def _list_files(self) -> dict[str, set[str] | None]:
        """File name -> the tensors that the index says are in it (None: all that are)."""
        if (self.path / SINGLE_FILE).exists():  # as transformers does when both are there
            return {SINGLE_FILE: None}
        index = self.path / INDEX_FILE
        if index.exists():
            files: dict[str, set[str] | None] = {}
            for name, file in _weight_map(index).items():
                if not _is_file_name(file):  # it may have been downloaded
                    raise UserError(f"{index} names {file!r}, which is not beside it; name a file of the directory")
                files.setdefault(file, set()).add(name)
            return files
        raise UserError(
            f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model as safetensors "
            "(transformers' save_pretrained does)"
        )


def _weight_map(index: Path) -> Mapping[str, Any]:
    """Tensor name -> its file, as the index says."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index} has no weight_map of tensors to files; copy it again from its origin")
    return found


def _is_file_name(file: Any) -> bool:
    """Whether it names a file of the same directory: no path, no `..`, nothing that is no name."""
    return isinstance(file, str) and Path(file).name == file and file not in ("", "..") and "\x00" not in file


def _is_ignored(name: str, ignored: set[str]) -> bool:
    """The well-known non-parameters: old Llama files carry the rotary table."""
    return name in ignored or name.endswith("rotary_emb.inv_freq")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model directory."""
    if not path.exists():
        raise UserError(f"{path} does not exist; {path.parent} is not a complete Hugging Face directory")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # json's and Unicode's errors are ValueErrors
        raise UserError(f"{path} is not valid JSON ({error}); copy it again from its origin") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy it again from its origin") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a mapping and is a {type(found).__name__}; copy it again from its origin")
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist, though {INDEX_FILE} names it; download it again") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); download or export it again") from error


def listing(names: list[str], limit: int = 20) -> str:
    """The names for an error's line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
