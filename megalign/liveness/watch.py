"""The thread that knows of the job's other ranks: it ends this process when one of them died or all must leave.

It ends the process itself, since the thread that trains may wait in a collective for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from megalign.liveness.node import Node, Peer
from megalign.liveness.pace import Pace, done_within, dump_stacks
from megalign.liveness.reason import Reason
from megalign.liveness.star import Star

_TICK = 0.5  # seconds between two looks
_WRITING = 10.0  # seconds that a file of stacks may take
EXIT_PEER_LOST = 1


class Watch:
    """Of this process over the others of its job."""

    def __init__(self, rank: int, world: int) -> None:
        # torchrun starts the ranks anew under the same launcher, perhaps at the same port.
        job = f"{os.environ.get('MASTER_PORT', '0')}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.rank = rank
        self._process = os.getpid()
        self._node = Node(rank, world, job=job)
        self._star: Star | None = None
        self._pace: Pace | None = None
        self._stacks: Path | None = None
        self._over = threading.Event()
        self._failed = self._waited = False
        self._looks = 0  # that found nothing
        self._ending = threading.Lock()
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)  # NCCL's own watchdog aborts the process
        atexit.register(self.leave)
        self._hook_uncaught()
        self._thread = threading.Thread(target=self._run, name="megalign-liveness", daemon=True)
        self._thread.start()

    def join(self, store: Any, number: int) -> None:
        """Connects the ranks of all nodes, once they have torch.distributed's store."""
        if self._star is not None:
            return
        self._hook_uncaught()  # outside of torch.distributed's, which keeps to itself what the inner ones write
        try:
            self._star = Star(self.rank, store, number)
        except OSError as error:
            print(
                f"megalign: rank {self.rank} cannot connect to rank 0 ({error}): it will notice a death on another "
                "node only when a collective fails",
                file=sys.stderr,
                flush=True,
            )

    @contextlib.contextmanager
    def limited(self, seconds: float, directory: str) -> Iterator[None]:
        """The calling thread may not stand still for longer, nor leave without the others; stacks go to `stacks/`."""
        self._stacks = Path(directory) / "stacks" / f"rank_{self.rank:05d}.txt"
        self._limit, self._pace = seconds, Pace(seconds)
        try:
            yield
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                self._end(self._left(leaving.code))
            raise
        finally:
            pace, self._pace = self._pace, None
            pace.end()

    def end_job(self, reason: Reason) -> None:
        """Tells all ranks to leave; the caller leaves by itself."""
        self._node.announce(reason)
        if self._star is not None:
            self._star.say(reason)

    def leave(self) -> None:
        """This process may end: it is no death, unless an error ends it."""
        if self._process != os.getpid() or self._failed or self._over.is_set():
            return
        self._over.set()
        if self._star is not None:
            self._star.wake()
        self._thread.join(5.0)

    def await_verdict(self, seconds: float) -> None:
        """Gives the watch time, once, to see who died; it ends this process then.

        The clock alone would not do: where nothing of this process has run for a while, both threads are due at once,
        and the one that failed would take a death that the watch has not looked for yet for another rank's error. A
        look may have begun before the call, the second cannot.
        """
        if self._waited:
            return
        self._waited = True
        end, looks = time.monotonic() + seconds, self._looks + 2
        while time.monotonic() < end or (self._looks < looks and self._thread.is_alive()):  # a fork has no watch
            if self._over.wait(0.1):
                return

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                reason = self._news()
                if reason is not None and not self._over.is_set():
                    self._end(reason)
                self._looks += 1
        except Exception as error:  # whatever it is: without its watch this rank would wait for the dead
            if not self._over.is_set():
                self._end(self._failed_itself(error))
        if self._star is not None:
            self._star.leave()
        self._node.leave()

    def _failed_itself(self, error: Exception) -> Reason:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Reason(
            status=EXIT_PEER_LOST,
            text=f"rank {self.rank} cannot watch over the others any more ({told}, in {last.name} at "
            f"{os.path.basename(last.filename)}:{last.lineno}), so that a death would go unnoticed: all end; start "
            "it again with resume_from_checkpoint latest",
        )

    def _news(self) -> Reason | None:
        died, reason = [], None
        if self._star is None:
            self._over.wait(_TICK / 2)
        else:
            died, reason = self._star.poll(_TICK)
        gone = self._node.dead()
        # Last: who leaves for a reason has given it before, and is no death of its own.
        reason = reason or self._node.reason()
        if reason is not None:
            return reason
        if gone or died:
            return Reason(status=EXIT_PEER_LOST, text=_told(gone, died), stacks=True)
        pace = self._pace  # the thread that trains takes it away when it likes
        place = None if pace is None else pace.overdue()
        if place is None:
            return None
        return Reason(
            status=EXIT_PEER_LOST,
            text=f"rank {self.rank} has stood still for {self._limit:g} s (ddp_timeout) at {place}, as all ranks do "
            f"that wait for one another; their stacks are in {self._stacks.parent}: the one that is not in a "
            "collective holds up the rest; mend it, or raise ddp_timeout",
            stacks=True,
        )

    def _end(self, reason: Reason) -> NoReturn:
        self._ending.acquire()  # for good: the thread that trains may fail while the watch ends the process
        try:
            is_first = self._node.announce(reason)
            if self._star is not None:
                self._star.say(reason)
            if reason.text and is_first:
                # Not print: the other thread may hold its lock. The cursor may stand behind a progress bar.
                os.write(2, f"\nmegalign: error: {reason.text}\n".encode())
            if reason.stacks and self._stacks is not None:
                where = f"rank {self.rank}, process {os.getpid()} on {socket.gethostname()}"
                dump_stacks(self._stacks, f"{where}: {reason.text}", seconds=_WRITING)
            done_within(1.0, _flush)
            self._node.leave()
        finally:
            os._exit(reason.status)

    def _hook_uncaught(self) -> None:
        """Python would wait for every thread before it ends, and those of NCCL may never do."""
        previous = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            is_mine = self._process == os.getpid() and threading.current_thread() is threading.main_thread()
            if hasattr(sys, "ps1") or not is_mine or self._over.is_set():  # a prompt goes on after an error
                previous(kind, error, trace)
                return
            if isinstance(error, RuntimeError):  # a collective of which a peer has left
                self.await_verdict(3.0)
            self._failed = True
            try:
                previous(kind, error, trace)
            finally:
                if self._hook is hook:
                    told = " ".join(f"{kind.__name__}: {error}".split())[:300]
                    self._end(Reason(status=1, text=_told_of_error(self.rank, told)))

        self._hook = sys.excepthook = hook

    def _left(self, code: object) -> Reason:
        status = code & 255 if isinstance(code, int) else 0
        return Reason(status=status or 1, text=_told_of_error(self.rank, f"sys.exit({code!r})"))


def _told(gone: list[Peer], died: list[int]) -> str:
    processes = {peer.rank: f"process {peer.process}" for peer in gone}
    ranks = sorted({*processes, *died})
    who = ", ".join(f"rank {rank} ({processes.get(rank, 'its connection is closed')})" for rank in ranks)
    return (
        f"{who} {'has' if len(ranks) == 1 else 'have'} died, so the other ranks end; the rank's own output says why, "
        "the kernel's log where it was killed; start the job again with resume_from_checkpoint latest"
    )


def _told_of_error(rank: int, error: str) -> str:
    return f"rank {rank} has ended with {error}, so the other ranks end; its own output says where"


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


_watch: Watch | None = None
_joined = itertools.count()  # every rank has the same calls in the same order


def start(rank: int, world: int) -> None:
    """From now on this rank's death is known to the others of its node, and theirs to it."""
    global _watch
    if world > 1 and _watch is None:
        _watch = Watch(rank, world)


def join(store: Any) -> None:
    """From now on to those of other nodes as well; called by every rank."""
    if _watch is not None:
        _watch.join(store, next(_joined))


def leave() -> None:
    """What this process does now concerns no other rank."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def limited(seconds: float, directory: str) -> contextlib.AbstractContextManager[None]:
    """The calling thread may not stand still for longer, where it has peers that would wait for it."""
    return contextlib.nullcontext() if _watch is None else _watch.limited(seconds, directory)


def end_job(status: int) -> None:
    """Every rank leaves with this status; this one has said why, and leaves by itself."""
    if _watch is not None:
        _watch.end_job(Reason(status=status))


def await_verdict(seconds: float = 3.0) -> None:
    """For a thread that failed perhaps only because a peer died: does not return if one did."""
    if _watch is not None:
        _watch.await_verdict(seconds)
