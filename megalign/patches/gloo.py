"""One polling thread for all of a process's gloo groups."""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d


def share_device() -> None:
    """Groups that are made from now on share their network devices; a second call changes nothing.

    torch (2.13, csrc/distributed/c10d/init.cpp, ProcessGroupGloo's constructor with a timeout) gives every group
    devices of its own, and gloo each of them a thread that wakes a hundred times a second. Megatron makes some fifty
    groups a rank, on GPUs as well ("cpu:gloo,cuda:nccl"): together they took a tenth of a core, and twice the time in
    a small all-reduce. Goes when torch shares them.
    """
    if distributed_c10d.ProcessGroupGloo is ProcessGroupGloo:
        # torch's own name, for it asks whether what it made is one of them.
        distributed_c10d.ProcessGroupGloo = _OnSharedDevices


class _AnyGloo(type(ProcessGroupGloo)):
    def __instancecheck__(cls, group: Any) -> bool:
        # The same group comes back from C++ as torch's own class once Python has let go of what it made.
        return isinstance(group, ProcessGroupGloo)


class _OnSharedDevices(ProcessGroupGloo, metaclass=_AnyGloo):
    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = _devices()
        options._timeout = timeout
        options._threads = 2 * len(options._devices)
        super().__init__(store, rank, size, options)


@functools.cache
def _devices() -> list[Any]:
    """Where torch itself would listen: GLOO_SOCKET_IFNAME's interfaces, or that of the host's name."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if names:
        return [ProcessGroupGloo.create_device(interface=name) for name in names]
    return [ProcessGroupGloo.create_default_device()]
