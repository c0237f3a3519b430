"""Jobs that must fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.forked import forked_job
from tests.jobs.start import error_lines


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
    with forked_job(words, cwd, ranks=ranks, first=first) as job:
        return Failed(job.wait(timeout), job.stderr)


def no_vllm() -> None:
    """As on a machine where vLLM was never installed."""
    assert "vllm" not in sys.modules
    sys.modules["vllm"] = None  # type: ignore[assignment]  # Python's own mark of a module that is not there


def random_rollout() -> None:
    """Random completions instead of vLLM's: what is looked at comes after them."""
    from megalign.trainers import online
    from tests.trainers.grpo_runs import RandomRollout

    online.VllmEngine = RandomRollout
