"""Processes that take a step when they are told to, so that two of them can be timed in turns."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from megalign import launch
from megalign.errors import UserError
from tools.benchmarks import machine

CONTEXT: Any = multiprocessing.get_context("spawn")
_LAST_LINES = 20


class Worker:
    """A process that runs `target(pipe, *args)`; the target answers each word that comes through the pipe.

    What it prints goes to a file below `scratch`, whose end is shown when the process ends before it has answered.
    """

    def __init__(
        self,
        name: str,
        scratch: str,
        target: Callable[..., None],
        *args: Any,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._log = name, Path(scratch) / f"{name}.log"
        self._pipe, far_end = CONTEXT.Pipe()
        given = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM") if name in os.environ}
        self._process = CONTEXT.Process(target=_serve, args=(far_end, self._log, {**given, **(environ or {})}))
        self._process.start()
        far_end.close()  # so that its death is seen as the end of the pipe
        self._pipe.send((target, args))

    def ask(self) -> None:
        """Lets it take a step; workers that need one another are asked before any of them is waited for."""
        with suppress(OSError):  # `answer` says that it has ended
            self._pipe.send(True)

    def answer(self) -> Any:
        """What it sends back."""
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            print(*lines, sep="\n", file=sys.stderr)
            raise UserError(f"{self.name} ended before its step; its last lines are above") from None

    def step(self) -> Any:
        """Both."""
        self.ask()
        return self.answer()

    def peak_rss(self) -> int:
        """The most memory that was resident at once, in bytes, as the kernel kept it."""
        return machine.status_bytes(self._process.pid, "VmHWM")

    def dismiss(self) -> None:
        """Nobody wants another step."""
        self._pipe.close()

    def stop(self) -> None:
        """Ends the process, which has been dismissed."""
        self._process.join(timeout=20)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, log: Path, environ: Mapping[str, str]) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in launch.alone():  # a worker is a job of its own, whatever the process that started it belongs to
        os.environ.pop(name, None)
    os.environ.update(environ)
    target, args = pipe.recv()  # whose modules are imported now, and no earlier
    target(pipe, *args)


def asked(pipe: Connection) -> Iterator[None]:
    """For a target: once for each word, until nobody wants another step."""
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        yield


@contextmanager
def stopped_at_the_end() -> Iterator[Callable[[Worker], Worker]]:
    """A function that takes workers, which end with the block; ranks of one job all at once."""
    workers: list[Worker] = []

    def keep(worker: Worker) -> Worker:
        workers.append(worker)
        return worker

    try:
        yield keep
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.stop()


def take_turns(
    workers: Sequence[Worker],
    repetitions: int,
    dtype: str,
    console: Console,
    text: Callable[[Any], str],
    check: Callable[[int, Sequence[Any]], None] = lambda number, found: None,
) -> tuple[list[list[Any]], list[machine.Limits]]:
    """(each worker's answers, the machine's limits after each round), after one step of each that is not counted.

    `check` sees each round's number and answers, of the uncounted one 0, and raises where the work was not the same.
    """
    answers: list[list[Any]] = [[] for _ in workers]
    limits = []
    for worker in workers:
        console.print(f"[dim]{worker.name}: warm-up")
    check(0, [worker.step() for worker in workers])
    for number in range(1, repetitions + 1):
        found = [worker.step() for worker in workers]
        limits.append(machine.measure_limits(dtype))
        told = "  ".join(f"{worker.name} {text(one)}" for worker, one in zip(workers, found, strict=True))
        console.print(f"[dim]{number}/{repetitions}  {told}")
        check(number, found)
        for kept, one in zip(answers, found, strict=True):
            kept.append(one)
    return answers, limits
