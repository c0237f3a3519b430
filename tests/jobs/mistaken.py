"""Jobs that must fail: the command line's `main` in ranks forked from a warm server, so that one takes a second.

Nobody ends a rank because another has left, as torchrun would: each must find its own way out.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.start import error_lines, free_port
from tests.ranks import _CONTEXT


@dataclass(frozen=True)
class Failed:
    """How the ranks of a job ended; the text of all of them together."""

    statuses: list[int | None]  # None: was still running
    stderr: str

    @property
    def line(self) -> str:
        """The one line, after a look at all else that must hold of every mistake."""
        assert self.statuses == [2] * len(self.statuses), f"{self.statuses}\n{self.stderr}"
        assert "Traceback" not in self.stderr, self.stderr
        (line,) = error_lines(self.stderr)
        return line


def start_mistaken(
    words: Sequence[object], cwd: Path, *, ranks: int = 2, first: Callable[[], None] | None = None, timeout: float = 90
) -> Failed:
    """`megalign words` on every rank; `first` is called before, in each."""
    with tempfile.NamedTemporaryFile("r") as stderr:
        shared = (ranks, free_port(), str(cwd), stderr.name, [str(word) for word in words], first)
        processes = [_CONTEXT.Process(target=_rank, args=(rank, *shared)) for rank in range(ranks)]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        statuses = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return Failed(statuses, stderr.read())


def _rank(
    rank: int, world: int, port: int, cwd: str, stderr: str, words: list[str], first: Callable[[], None] | None
) -> None:
    # Progress bars of several ranks must not overwrite what another has written.
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(cwd)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    import torch

    from megalign.cli import main

    torch.set_num_threads(1)
    if first is not None:
        first()
    sys.exit(main(words))


def no_vllm() -> None:
    """As on a machine where vLLM was never installed."""
    assert "vllm" not in sys.modules
    sys.modules["vllm"] = None  # type: ignore[assignment]  # Python's own mark of a module that is not there


def random_rollout() -> None:
    """Random completions instead of vLLM's: what is looked at comes after them."""
    from megalign.trainers import online
    from tests.trainers.grpo_runs import RandomRollout

    online.VllmEngine = RandomRollout
