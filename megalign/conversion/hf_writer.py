"""Hugging Face directories: HfDirectory is one that is being written, HfWriter fills it from a stream of tensors."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megalign import durable
from megalign.conversion.hf_config import COMPANION_FILES, write_companions, write_json
from megalign.conversion.hf_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from megalign.errors import UserError
from megalign.output_lock import OutputLock

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class HfDirectory:
    """A directory that is written under a temporary name; what stands at `path` is whole, or has no config.json.

    One process at a time may: who writes holds the lock.

    `special_tokens` (`eos_token_id` and the like) are the tokenizer's, with which the config files must agree.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: str | os.PathLike[str],
        *,
        config_changes: Mapping[str, Any] | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.path, self.source = Path(path), Path(source)
        self._config = {"config_changes": config_changes, "special_tokens": special_tokens}
        # On the target's file system, so that files are renamed and never copied.
        home = self.path if self.path.exists() else self.path.parent
        self._partial = home / f".{self.path.name}.partial"

    def begin(self) -> None:
        """Makes room for the shards, where a killed process left some too."""
        with self.told():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def shard_file(self, number: int) -> Path:
        """Where shard `number` (from 0) is to be written."""
        return self._partial / f"shard-{number}"

    def finish(self, shards: Sequence[Iterable[str]], total_bytes: int, dtype: torch.dtype | None) -> None:
        """Adds what else belongs there and moves the whole to its place; `shards` are the tensors' names of each."""
        with self.told():
            write_companions(self.source, self._partial, dtype=dtype, **self._config)
            self._name_shards(shards, total_bytes)
            durable.sync_tree(self._partial)
            self._move()

    def discard(self) -> None:
        """Removes what was written so far."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _name_shards(self, shards: Sequence[Iterable[str]], total_bytes: int) -> None:
        """Gives the shards transformers' names, and writes the index unless there is only one."""
        count = len(shards)
        weight_map = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE_FILE
            weight_map.update(dict.fromkeys(names, file))
            target = self.shard_file(number).rename(self._partial / file)
            shutil.copymode(self._partial / CONFIG_FILE, target)  # safetensors makes its files private
        if count > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            write_json(self._partial / INDEX_FILE, index)

    def _move(self) -> None:
        if not self.path.exists():
            durable.rename(self._partial, self.path)
            return
        # What stands between an older export and the new one is no model: it has no config.json until all else is in
        # place, and no index, which would name the new shards.
        (self.path / CONFIG_FILE).unlink(missing_ok=True)
        (self.path / INDEX_FILE).unlink(missing_ok=True)
        for old in self.path.glob("model*.safetensors"):
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
                old.unlink()
        for name in COMPANION_FILES:  # an earlier run's chat template would speak for this model
            if not (self._partial / name).exists():
                (self.path / name).unlink(missing_ok=True)
        for file in self._partial.iterdir():
            if file.name != CONFIG_FILE:
                file.replace(self.path / file.name)
        durable.sync(self.path)
        durable.rename(self._partial / CONFIG_FILE, self.path / CONFIG_FILE)
        self._partial.rmdir()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turns a full disk, a read-only directory and the like into a UserError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.discard()
            raise UserError(
                f"cannot write the model to {self.path} ({error}); make room or choose another directory"
            ) from error


class HfWriter(HfDirectory):
    """Writes a directory in shards; `add` holds at most one of them in memory."""

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
        super().__init__(path, source, config_changes=config_changes, special_tokens=special_tokens)
        self.dtype = dtype
        self.max_bytes = parse_size(max_shard_size)
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._dtypes: Counter[torch.dtype] = Counter()
        self._lock = OutputLock(self.path, self._partial.parent)
        with self.told():
            self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        self.begin()

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
        # A head in fp32 leaves the model what it is.
        dtype = self._dtypes.most_common(1)[0][0] if self._dtypes else None
        self.finish(self._shards, self._total_bytes, dtype)
        self._lock.release()

    def discard(self) -> None:
        """See HfDirectory.discard."""
        super().discard()
        self._lock.release()

    def _write_shard(self) -> None:
        with self.told():
            file = self.shard_file(len(self._shards))
            save_file(self._pending, file, metadata={"format": "pt"})
            durable.sync(file)  # not all of them at the end, while other ranks wait
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def parse_size(size: str | int) -> int:
    """ "5GB" or 5000000000 -> bytes; KB/MB/GB are decimal, as in transformers, KiB/MiB/GiB binary."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"max_shard_size {size!r} is not a size; write it like '5GB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])
