"""The ranks of one launcher on one node, from their first moment: a file each in a directory that all of them know.

A process that is gone while its file is still there has died, however busy the others are: nothing has to be sent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from megalign.liveness.reason import Reason

_REASON = "reason"


class Peer(NamedTuple):
    """Another rank's process."""

    rank: int
    process: int
    started: str  # in clock ticks since the machine did: a number of a process may be given anew


class Node:
    """This rank's file, and a look at the others'."""

    def __init__(self, rank: int, *, job: str) -> None:
        """`job` tells one job of a launcher (a shell, say) from the next."""
        self._directory = _directory_of(os.getppid(), job)
        self._directory.mkdir(exist_ok=True)
        self._mine = self._directory / str(rank)
        if self._mine.exists():  # an earlier job's of the same name, as is the reason for its end
            (self._directory / _REASON).unlink(missing_ok=True)
        unfinished = self._directory / f"{rank}.new"
        unfinished.write_text(f"{os.getpid()} {started(os.getpid())}")
        unfinished.rename(self._mine)
        self._began = self._mine.stat().st_mtime_ns
        # Seen with this rank's own eyes: files of an earlier job tell of processes that are long gone.
        self._alive: dict[int, Peer] = {}

    def dead(self) -> list[Peer]:
        """The peers that left without a word."""
        names = [name for name in os.listdir(self._directory) if name.isdigit() and name != self._mine.name]
        return [peer for name in names if (peer := self._dead(self._directory / name)) is not None]

    def _dead(self, file: Path) -> Peer | None:
        peer, began = self._alive.get(int(file.name)), 0
        if peer is None:
            peer, began = _read(file)
        if peer is None:  # it has just left
            return None
        if started(peer.process) == peer.started:
            self._alive[peer.rank] = peer
            return None
        known = peer.rank in self._alive or began >= self._began
        return peer if known and file.exists() else None

    def announce(self, reason: Reason) -> bool:
        """Tells the node's ranks to leave; whether this rank is the first to say so."""
        unfinished = self._mine.with_suffix(".reason")
        unfinished.write_text(reason.to_line())
        try:
            os.link(unfinished, self._directory / _REASON)  # whole, and only if there is none
        except FileExistsError:
            return False
        finally:
            unfinished.unlink()
        return True

    def reason(self) -> Reason | None:
        """Why the ranks of this node must leave."""
        try:
            return Reason.of_line((self._directory / _REASON).read_text())
        except FileNotFoundError:
            return None

    def leave(self) -> None:
        """This rank's end is no death; the last of the node clears up."""
        self._mine.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still there, or a reason that they have not read yet
            self._directory.rmdir()


def started(process: int | str) -> str | None:
    """When the process started, in clock ticks since the machine did; None where it is gone, waited for or not."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            words = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]


def _directory_of(launcher: int, job: str) -> Path:
    stem = f"megalign-{os.getuid()}-"
    place = Path(tempfile.gettempdir())
    begun = started(launcher)
    if begun is not None:
        _remove_left_behind(place, stem)
    return place / f"{stem}{launcher}-{begun or 0}-{job}.ranks"


def _remove_left_behind(place: Path, stem: str) -> None:
    """The directories of launchers that are gone: a rank that died could not remove its file."""
    for path in place.glob(f"{stem}*.ranks"):
        process, begun, *_ = path.name.removeprefix(stem).split("-")
        if started(process) != begun:
            shutil.rmtree(path, ignore_errors=True)


def _read(file: Path) -> tuple[Peer | None, int]:
    try:
        process, begun = file.read_text().split()
        return Peer(int(file.name), int(process), begun), file.stat().st_mtime_ns
    except FileNotFoundError:
        return None, 0
