"""Whether the thread that trains stands still, and what every thread of the process is doing."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

_SLACK = 20.0  # seconds: what the watch itself may be late
_RENEWED = 5.0


class Pace:
    """Made by the thread that trains, looked at by the watch."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._thread = threading.get_ident()
        self._seen: tuple[tuple[int, int], ...] = ()
        self._since = self._renewed = time.monotonic()
        self._ended, self._ending = False, threading.Lock()
        self._renew()

    def overdue(self) -> str | None:
        """Where the thread stands, if it has been at the same instruction of every frame for longer than the limit."""
        now = time.monotonic()
        if now - self._renewed > _RENEWED:
            self._renewed = now
            self._renew()
        frame = innermost = sys._current_frames().get(self._thread)
        marks = []
        while frame is not None:
            marks.append((id(frame), frame.f_lasti))
            frame = frame.f_back
        if (stands := tuple(marks)) != self._seen:
            self._seen, self._since = stands, now
            return None
        if now - self._since < self._limit or innermost is None:
            return None
        code = innermost.f_code
        return f"{os.path.basename(code.co_filename)}:{innermost.f_lineno} in {code.co_name}"

    def end(self) -> None:
        """Nobody waits any more."""
        with self._ending:
            self._ended = True
            faulthandler.cancel_dump_traceback_later()

    def _renew(self) -> None:
        # For a thread that never lets go of the interpreter: then the watch cannot run, and this timer, in C, can.
        with self._ending:
            if not self._ended:  # or the watch, which is late, would set the timer of a run that is over
                faulthandler.dump_traceback_later(self._limit + _SLACK, exit=True, file=2)


def dump_stacks(path: Path, text: str, *, seconds: float) -> None:
    """The Python stacks of all threads into a file, or to stderr where it cannot be written within so long."""
    try:
        # faulthandler holds the interpreter while it writes, which is no matter in a directory of this machine.
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
    except OSError:
        faulthandler.dump_traceback(2, all_threads=True)
        return
    if not done_within(seconds, lambda: _write(path, f"{text}\n\n".encode() + stacks)):
        os.write(2, f"{path} cannot be written\n".encode() + stacks)


def done_within(seconds: float, act: Callable[[], object]) -> bool:
    """Whether it was done; what is not, on a file system that hangs, stays behind in a thread."""
    done: list[bool] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            act()
            done.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
