"""The ranks of one launcher on one node, from their first moment: a file each in a directory that all of them know.

A process that is gone while its file is still there has died, however busy the others are: nothing has to be sent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

from megalign.liveness.launcher import path_of_launcher, started
from megalign.liveness.reason import Reason

_REASON = "reason"
# A process that was gone before this one came is of the same job if it started about when this one did, and if nobody
# takes its place: a job that was started again is not ended by what the one before has left.
_TOGETHER = 60.0  # seconds
_PATIENCE = 15.0


class Peer(NamedTuple):
    """Another rank's process."""

    rank: int
    process: int
    started: str  # in clock ticks since the machine did: a number of a process may be given anew


class Node:
    """This rank's file, and a look at the others'."""

    def __init__(self, rank: int, world: int, *, job: str) -> None:
        """`job` tells one job of a launcher (a shell, say) from the next."""
        self._directory = path_of_launcher(f"-{job}.ranks")
        self._directory.mkdir(exist_ok=True)
        self._world, self._mine = world, self._directory / str(rank)
        self._left = self._mine.with_suffix(".left")
        if self._mine.exists() or self._left.exists():  # an earlier job's of the same name, as is what ended it
            (self._directory / _REASON).unlink(missing_ok=True)
            self._left.unlink(missing_ok=True)
        unfinished = self._directory / f"{rank}.new"
        self._started, self._came = started(os.getpid()), time.monotonic()
        unfinished.write_text(f"{os.getpid()} {self._started}")
        unfinished.rename(self._mine)
        self._began = self._mine.stat().st_mtime_ns
        # Seen with this rank's own eyes: files of an earlier job tell of processes that are long gone.
        self._alive: dict[int, Peer] = {}
        self._sees = self._started is not None  # not every system has /proc

    def dead(self) -> list[Peer]:
        """The peers that left without a word."""
        try:
            names = [name for name in os.listdir(self._directory) if name.isdigit() and name != self._mine.name]
        except FileNotFoundError:  # this process leaves, as the last one, while its watch still looks
            return []
        return [peer for name in names if self._sees and (peer := self._dead(self._directory / name)) is not None]

    def _dead(self, file: Path) -> Peer | None:
        peer, began = self._alive.get(int(file.name)), 0
        if peer is None:
            peer, began = _read(file)
        if peer is None:  # it has just left
            return None
        if started(peer.process) == peer.started:
            self._alive[peer.rank] = peer
            return None
        known = peer.rank in self._alive or began >= self._began or self._began_together(peer)
        return peer if known and file.exists() else None

    def _began_together(self, peer: Peer) -> bool:
        if peer.rank >= self._world or time.monotonic() - self._came < _PATIENCE:
            return False
        ticks = int(self._started) - int(peer.started)
        return ticks < _TOGETHER * os.sysconf("SC_CLK_TCK")

    def announce(self, reason: Reason) -> bool:
        """Tells the node's ranks to leave; whether this rank is the first to say so."""
        # A file of this thread's: the one that trains and the watch may speak at once, and what either writes into a
        # file that is linked already is what the others read.
        unfinished = self._mine.with_suffix(f".{threading.get_ident()}.reason")
        try:
            unfinished.write_text(reason.to_line())
            os.link(unfinished, self._directory / _REASON)  # whole, and only if there is none
        except FileExistsError:
            return False
        except OSError:  # a full disk, a directory that was cleared away: the rank must leave all the same
            return True
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()
        return True

    def reason(self) -> Reason | None:
        """Why the ranks of this node must leave."""
        try:
            return Reason.of_line((self._directory / _REASON).read_text())
        except FileNotFoundError:
            return None

    def leave(self) -> None:
        """This rank's end is no death; the last one clears up, unless a rank that has not come yet must be told why."""
        with contextlib.suppress(OSError):  # cleared up by another that was the last as well, say
            self._mine.rename(self._left)
            files = [file for file in self._directory.iterdir() if file.stem.isdigit() and file.suffix in ("", ".left")]
            alive = [file for file in files if not file.suffix and self._is_alive(file)]
            if not alive and (len(files) == self._world or not (self._directory / _REASON).exists()):
                shutil.rmtree(self._directory, ignore_errors=True)

    def _is_alive(self, file: Path) -> bool:
        peer, _ = _read(file)
        return peer is not None and self._sees and started(peer.process) == peer.started


def _read(file: Path) -> tuple[Peer | None, int]:
    try:
        process, begun = file.read_text().split()
        return Peer(int(file.name), int(process), begun), file.stat().st_mtime_ns
    except FileNotFoundError:
        return None, 0
