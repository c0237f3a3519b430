"""Jobs whose ranks are forked from a warm server, so that one takes a second; else they are what a user starts.

Nobody ends a rank because another has left, as torchrun would: each must find its own way out.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megalign.launch import hold_port
from tests.ranks import _CONTEXT


class ForkedJob:
    """Ranks that are on their way."""

    def __init__(self, processes: Sequence[Any], place: Path) -> None:
        self._processes, self._place = processes, place

    def process(self, rank: int) -> int | None:
        """The number of a rank's process, once the other ranks can know it."""
        try:
            known = list(self._place.rglob(f"megalign-*.ranks/{rank}"))
        except FileNotFoundError:  # the last rank has just cleared up
            known = []
        return self._processes[rank].pid if known else None

    def wait(self, timeout: float) -> list[int | None]:
        """The ranks' statuses; None of one that still runs after so many seconds."""
        end = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self._processes]

    @property
    def stdout(self) -> str:
        """Of all ranks together."""
        return (self._place / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """Of all ranks together."""
        return (self._place / "stderr").read_text(errors="replace")


@contextlib.contextmanager
def forked_job(
    words: Sequence[object],
    cwd: Path,
    *,
    ranks: int = 2,
    nodes: int = 1,
    first: Callable[[], None] | None = None,
) -> Iterator[ForkedJob]:
    """`megalign words` on every rank; `first` is called before, in each. All are ended when the block is left.

    With several `nodes` no rank finds another one's file, as on nodes of their own.
    """
    with tempfile.TemporaryDirectory() as directory, hold_port() as held:
        place, port = Path(directory), held.getsockname()[1]
        for name in ("stdout", "stderr", *map(str, range(nodes))):
            (place / name).mkdir() if name.isdigit() else (place / name).touch()
        given = (str(cwd), place, [str(word) for word in words], first)
        processes = [
            _CONTEXT.Process(target=_rank, args=(_environment(rank, ranks, port, place / str(rank % nodes)), *given))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            yield ForkedJob(processes, place)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _environment(rank: int, world: int, port: int, temporary: Path) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary),
    }


def _rank(environ: dict[str, str], cwd: str, place: Path, words: list[str], first: Callable[[], None] | None) -> None:
    # Progress bars of several ranks must not overwrite what another has written.
    os.dup2(os.open(place / "stderr", os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(place / "stdout", os.O_WRONLY | os.O_APPEND), 1)
    os.chdir(cwd)
    os.environ.update(environ)
    tempfile.tempdir = environ["TMPDIR"]  # the server knows its own already
    import torch

    from megalign import liveness
    from megalign.cli import main

    torch.set_num_threads(1)
    if first is not None:
        first()
    try:
        sys.exit(main(words))
    except SystemExit:  # what another exception ends is a death
        liveness.leave()  # Python does at its exit, but not at a fork's, and who leaves would count as dead
        raise
