"""Processes that are forked to work beside this one: how their result comes back, and that they end with it."""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import signal
import tempfile
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Result:
    """One value from a forked process to its parent, or within a process; what Megatron calls a results queue.

    A file without a name rather than a pipe, which would fill up while the parent waits for the process to end.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when nobody holds it)

    def put(self, value: Any) -> None:
        """The value; called once, on either side of the fork."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The value; queue.Empty when there is none, as of a process that died."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None


def die_with(parent: int) -> None:
    """Called in a forked process: the kernel ends it when its parent is gone, whatever ended that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
