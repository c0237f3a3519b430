"""Hugging Face directories: HfReader reads slices of safetensors files, HfWriter writes a whole directory."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalign.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
# What makes a directory loadable besides weights and config.json; copied from the source when it is there.
COMPANION_FILES = (
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a model directory's config.json."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"model directory {str(path)!r} does not exist; give a local Hugging Face directory")
    return _read_json(directory / "config.json")


class HfReader:
    """The tensors of a model directory; only headers are read until a slice is asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = read_config(path)
        self._files: dict[str, Any] = {}  # tensor name -> its open file
        for file, names in self._list_files().items():
            opened = _open(self.path / file)
            keys = set(opened.keys())
            absent = sorted((names or keys) - keys)
            if absent:
                raise UserError(f"{self.path / file} lacks {_listing(absent)}, which {INDEX_FILE} promises")
            self._files.update(dict.fromkeys(names or keys, opened))

    def names(self) -> list[str]:
        """Every tensor of the directory."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._files[name].get_slice(name).get_shape())

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
        told = [f"{fault} tensors: {_listing(names)}" for fault, names in faults.items() if names]
        if told:
            raise UserError(f"{self.path} does not fit its config.json; {'; '.join(told)}")

    def _list_files(self) -> dict[str, set[str] | None]:
        """File name -> the tensors that the index says are in it (None: all that are)."""
        if (self.path / SINGLE_FILE).exists():  # as transformers does when both are there
            return {SINGLE_FILE: None}
        index = self.path / INDEX_FILE
        if index.exists():
            files: dict[str, set[str] | None] = {}
            for name, file in _read_json(index)["weight_map"].items():
                files.setdefault(file, set()).add(name)
            return files
        raise UserError(
            f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model as safetensors "
            "(transformers' save_pretrained does)"
        )


class HfWriter:
    """Writes a Hugging Face directory, in shards; what stands at `path` is whole, or has no index or weights.

    Everything is written under a temporary name first. `add` holds at most one shard in memory. `special_tokens`
    (`eos_token_id` and the like) are the tokenizer's, with which the config files must agree.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: str | int = "5GB",
        config_changes: Mapping[str, Any] | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.path, self.source, self.dtype = Path(path), Path(source), dtype
        self._config_changes = dict(config_changes or {})
        self._special_tokens = dict(special_tokens or {})
        self.max_bytes = parse_size(max_shard_size)
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._dtypes: Counter[torch.dtype] = Counter()
        # On the target's file system, so that files are renamed and never copied.
        home = self.path if self.path.exists() else self.path.parent
        self._partial = home / f".{self.path.name}.partial"
        with self._told():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of the tensor."""
        copied = tensor.detach().to("cpu", self.dtype or tensor.dtype, copy=True).contiguous()
        if self._pending and self._pending_bytes + copied.nbytes > self.max_bytes:
            self._write_shard()
        self._pending[name] = copied
        self._pending_bytes += copied.nbytes
        self._total_bytes += copied.nbytes
        self._dtypes[copied.dtype] += 1

    def close(self) -> None:
        """Writes the rest, and moves the whole to its place."""
        self._write_shard()
        with self._told():
            for file in COMPANION_FILES:
                if (self.source / file).exists():
                    shutil.copyfile(self.source / file, self._partial / file)
            self._write_config()
            self._name_shards()
            self._move()

    def discard(self) -> None:
        """Removes what was written so far."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _write_shard(self) -> None:
        file = self._partial / f"shard-{len(self._shards)}"
        with self._told():
            save_file(self._pending, file, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _write_config(self) -> None:
        config = read_config(self.source) | self._config_changes
        if self._dtypes:
            # A head in fp32 leaves the model what it is.
            name = str(self._dtypes.most_common(1)[0][0]).removeprefix("torch.")
            # transformers before 4.56 knows only torch_dtype: renew the key that the source has.
            keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
            config.update(dict.fromkeys(keys, name))
        file = self.source / GENERATION_FILE
        generation = _read_json(file) if file.exists() else None
        if align_special_tokens(config, generation, self._special_tokens) and generation is not None:
            _write_json(self._partial / GENERATION_FILE, generation)
        _write_json(self._partial / "config.json", config)

    def _name_shards(self) -> None:
        """Gives the shards transformers' names, and writes the index unless there is only one."""
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE_FILE
            weight_map.update(dict.fromkeys(names, file))
            target = (self._partial / f"shard-{number}").rename(self._partial / file)
            shutil.copymode(self._partial / "config.json", target)  # safetensors makes its files private
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            _write_json(self._partial / INDEX_FILE, index)

    def _move(self) -> None:
        if not self.path.exists():
            self._partial.rename(self.path)
            return
        # An older export's index would name the new shards: without it the directory is broken loudly
        # until the new one, which goes last, is in place.
        (self.path / INDEX_FILE).unlink(missing_ok=True)
        for old in self.path.glob("model*.safetensors"):
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
                old.unlink()
        for name in COMPANION_FILES:  # an earlier run's chat template would speak for this model
            if not (self._partial / name).exists():
                (self.path / name).unlink(missing_ok=True)
        for file in sorted(self._partial.iterdir(), key=lambda file: file.name == INDEX_FILE):
            file.replace(self.path / file.name)
        self._partial.rmdir()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns a full disk, a read-only directory and the like into a UserError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.discard()
            raise UserError(
                f"cannot write the model to {self.path} ({error}); make room or choose another directory"
            ) from error


def align_special_tokens(config: dict[str, Any], generation: dict[str, Any] | None, tokens: Mapping[str, int]) -> bool:
    """Brings a config.json and a generation_config.json to the tokenizer's tokens, in place; whether they differed.

    transformers' rule: a list of end tokens gets the tokenizer's in front and keeps the others, and the generation
    config's becomes such a list, because any of them ends a completion.
    """
    changed = False
    for name, token in tokens.items():
        known = [_as_list(values.get(name)) for values in (config, generation) if values is not None]
        if all(token in ids for ids in known):
            continue
        changed, several = True, name == "eos_token_id"
        in_front = [token, *(other for other in known[0] if other != token)]
        config[name] = in_front if several and isinstance(config.get(name), list) else token
        if generation is not None:
            in_front = [token, *(other for other in known[1] if other != token)]
            generation[name] = in_front if several else token
    return changed


def parse_size(size: str | int) -> int:
    """ "5GB" or 5000000000 -> bytes; KB/MB/GB are decimal, as in transformers, KiB/MiB/GiB binary."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"max_shard_size {size!r} is not a size; write it like '5GB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _is_ignored(name: str, ignored: set[str]) -> bool:
    """The well-known non-parameters: old Llama files carry the rotary table."""
    return name in ignored or name.endswith("rotary_emb.inv_freq")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} does not exist; {path.parent} is not a complete Hugging Face directory")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it again from its origin") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist, though {INDEX_FILE} names it; download it again") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); download or export it again") from error


def _listing(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
