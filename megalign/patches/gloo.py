"""gloo's threads: one that polls for all groups of a process, and none with a tensor in its hands when Python ends."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
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


def await_at_exit() -> None:
    """Before the interpreter ends, gloo's threads have let go of what they worked on; a second call changes nothing.

    A thread tells whoever waits for a collective that it is done, and lets go of its tensors after that, for which it
    needs the interpreter. It asks whether there still is one (torch 2.13, csrc/PyInterpreter.cpp), and waits for it.
    If the interpreter begins to end while it waits, CPython ends the thread, inside of a destructor that may not throw,
    and so the process, with status 134 and "terminate called without an active exception": a run that was good, and
    whose last collective stood near its end. Goes when torch does without the wait (pytorch issue 190489).
    """
    atexit.unregister(_await_threads)
    atexit.register(_await_threads)


def _await_threads(looks: int = 500) -> None:
    """Returns when no thread of gloo's has moved between two looks; where there is no /proc, at once.

    Looks are counted, not seconds: after a stall of the machine the threads need as long as ever.
    """
    before = None
    for _ in range(looks):
        now = _looked_at()
        if now == before and all(state.startswith("S") for state, *_ in now.values()):
            return
        before = now
        # Who waits for the interpreter wakes once in an interval, so that it has moved, whoever gets it.
        time.sleep(2 * sys.getswitchinterval())


def _looked_at() -> dict[str, list[str]]:
    """By thread of a group: its state, and how often it has gone to sleep and was put to sleep."""
    found = {}
    for thread in Path("/proc/self/task").glob("*/status"):
        try:
            told = dict(line.split(":\t", 1) for line in thread.read_text().splitlines() if ":\t" in line)
        except OSError:  # it has just ended
            continue
        if told["Name"] == "pt_gloo_runloop":
            found[str(thread)] = [told["State"], told["voluntary_ctxt_switches"], told["nonvoluntary_ctxt_switches"]]
    return found
