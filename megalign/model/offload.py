"""A sleeping engine's memory: tensors leave the device whole and come back bitwise, to the same views.

On CUDA their contents wait in host memory; on a CPU in an unlinked temporary file, so that the same hand-over
is real there too. The storages themselves are resized, so every view of them stays valid.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable
from typing import IO

import torch
from torch import Tensor

from megalign import device


class Offload:
    """The storages behind a set of tensors, on the device or away."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | IO[bytes]]] = []

    @property
    def asleep(self) -> bool:
        """Whether the contents are away."""
        return bool(self._away)

    def sleep(self, tensors: Iterable[Tensor]) -> None:
        """Moves the contents of every distinct storage away and frees it."""
        assert not self._away, "already asleep"
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        for storage in storages.values():
            if storage.nbytes():
                self._away.append((storage, storage.nbytes(), _store(storage)))
                storage.resize_(0)
        device.release_memory()

    def wake(self) -> None:
        """Brings everything back; nothing when awake."""
        for storage, size, kept in self._away:
            storage.resize_(size)
            _restore(storage, kept)
        self._away.clear()


def _store(storage: torch.UntypedStorage) -> Tensor | IO[bytes]:
    if storage.device.type == "cuda":
        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return torch.empty(content.shape, dtype=torch.uint8, pin_memory=True).copy_(content)
    file = tempfile.TemporaryFile(prefix="megalign-sleep-")  # noqa: SIM115  closed by wake
    file.write(_memory(storage))
    return file


def _restore(storage: torch.UntypedStorage, kept: Tensor | IO[bytes]) -> None:
    if isinstance(kept, Tensor):
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(kept)
        return
    with kept:
        kept.seek(0)
        read = kept.readinto(_memory(storage))  # type: ignore[attr-defined]
    assert read == storage.nbytes(), f"{read} of {storage.nbytes()} bytes came back"


def _memory(storage: torch.UntypedStorage) -> memoryview:
    # Not through numpy: torch forbids resizing a storage that numpy has seen.
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
