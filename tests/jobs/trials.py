"""A job of which a rank is killed, what the others do, and what is left; tools/fault_trials.py draws many of them."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megalign.launch import hold_port
from megalign.liveness.launcher import started
from tests.jobs import start
from tests.jobs.forked import forked_job
from tests.trainers.runs import digest, metric_lines

LIMIT = 45.0  # seconds until the others must be gone
STEPS = 6
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP3": (3, {}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "DP2, async_save": (2, {"async_save": True}),
    "TP2, async_save": (2, {"tensor_model_parallel_size": 2, "async_save": True}),
}
PHASES = ("start", "step", "save", "save", "end")  # a kill inside a save is the one that could cost most


class Job(Protocol):
    """Ranks that are on their way."""

    def process(self, rank: int) -> int | None:
        """The number of a rank's process, once it has one."""

    def wait(self, timeout: float) -> list[int | None]:
        """Statuses of what was started; None of what still runs after so many seconds."""

    @property
    def stderr(self) -> str:
        """Of all ranks and their launcher."""


Start = Callable[[Sequence[object], Path, int], contextlib.AbstractContextManager[Job]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a kill led to."""

    launcher: str
    layout: str
    victim: int
    phase: str
    moment: str  # where the run was
    others_gone_s: float
    named: bool
    resumed_from: int  # a step; 0 where no checkpoint was whole yet
    lost_steps: int  # taken, and taken again
    equal: bool  # losses and final weights are the undisturbed run's

    @property
    def passed(self) -> bool:
        """Whether all is as it must be."""
        most = 2 if "async_save" in self.layout else 1  # the save of the step before may be under way
        return self.others_gone_s <= LIMIT and self.named and self.equal and self.lost_steps <= most


# ---- a job


def words_of(layout: str, output_dir: Path) -> list[object]:
    """The command line of the job; checkpoints at every step, so that saves are easy to hit."""
    ranks, fields = LAYOUTS[layout]
    data_parallel = ranks // math.prod(fields.values())
    given = {
        "model_name_or_path": "model",
        "dataset_name": "rows.jsonl",
        "output_dir": output_dir,
        "max_steps": STEPS,
        "per_device_train_batch_size": 12 // data_parallel,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "disable_tqdm": True,
        "resume_from_checkpoint": "latest",
        **fields,
    }
    return ["sft", *(word for name, value in given.items() for word in (f"--{name}", value))]


@contextlib.contextmanager
def forked(words: Sequence[object], cwd: Path, ranks: int) -> Iterator[Job]:
    """From a server that has imported torch."""
    with forked_job(words, cwd, ranks=ranks) as job:
        yield job


class Started:
    """Processes of `subprocess`, with their ranks' numbers as they told each other in `place`."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], place: Path) -> None:
        self._processes, self._place = processes, place
        self.launcher = processes[0].pid  # under torchrun

    def process(self, rank: int) -> int | None:
        """Of the rank, not of its launcher."""
        found = list(self._place.glob(f"megalign-*.ranks/{rank}"))
        return int(found[0].read_text().split()[0]) if found else None

    def wait(self, timeout: float) -> list[int | None]:
        """Of the processes and, under torchrun, of nothing that they have started: it waits for its ranks."""
        end = time.monotonic() + timeout
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        return [process.returncode for process in self._processes]

    @property
    def stderr(self) -> str:
        """Of all together."""
        return (self._place / "stderr").read_text(errors="replace")

    def end(self) -> None:
        """Nothing is left of it."""
        ranks = [self.process(rank) for rank in range(8)]
        for process in self._processes:
            process.kill()
            process.wait()
        for number in filter(None, ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


@contextlib.contextmanager
def _started(commands: Sequence[Sequence[str]], cwd: Path, environs: Sequence[dict[str, str]]) -> Iterator[Started]:
    with tempfile.TemporaryDirectory() as place, (Path(place) / "stderr").open("ab") as stderr:
        job = Started(
            [
                subprocess.Popen(
                    command,
                    cwd=cwd,
                    env=start.environment(TMPDIR=place, **environ),
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
                for command, environ in zip(commands, environs, strict=True)
            ],
            Path(place),
        )
        try:
            yield job
        finally:
            job.end()


@contextlib.contextmanager
def plain(words: Sequence[object], cwd: Path, ranks: int) -> Iterator[Job]:
    """As srun starts them, without its --kill-on-bad-exit."""
    with hold_port() as held:
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        environs = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        with _started([start.megalign(*words)] * ranks, cwd, environs) as job:
            yield job


def torchrun(words: Sequence[object], cwd: Path, ranks: int) -> contextlib.AbstractContextManager[Started]:
    """One agent."""
    return _started([start.torchrun(ranks, "-m", "megalign", *words)], cwd, [{}])


LAUNCHERS: dict[str, Start] = {"forked": forked, "plain": plain, "torchrun": torchrun}


# ---- a trial


def losses(output_dir: Path) -> dict[int, float]:
    """By step; none where the run came to no step."""
    if not (output_dir / "metrics.jsonl").exists():
        return {}
    return {line["step"]: line["loss"] for line in metric_lines(output_dir) if "loss" in line}


def outcome(output_dir: Path) -> tuple[dict[int, float], str]:
    """Losses and final weights."""
    return losses(output_dir), digest(output_dir)


def undisturbed(layout: str, here: Path) -> tuple[dict[int, float], str]:
    """The outcome of a run that ends by itself."""
    output_dir = here / f"whole {layout}"
    if not (output_dir / "config.json").exists():
        with forked(words_of(layout, output_dir), here, LAYOUTS[layout][0]) as job:
            assert set(job.wait(600)) == {0}, job.stderr
    return outcome(output_dir)


def run_trial(launcher: str, layout: str, victim: int, phase: str, here: Path, draw: random.Random) -> Trial | None:
    """Starts, kills, waits, starts again; None where the job was over before the rank could be missed."""
    expected = undisturbed(layout, here)
    output_dir = here / "disturbed"
    shutil.rmtree(output_dir, ignore_errors=True)
    ranks = LAYOUTS[layout][0]
    words = words_of(layout, output_dir)
    with LAUNCHERS[launcher](words, here, ranks) as job:
        if not _await_moment(job, output_dir, victim, phase, draw):
            return None
        moment = _moment(output_dir)
        process = job.process(victim)
        if process is None or started(process) is None:
            return None
        os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        statuses = job.wait(LIMIT + 15)
        gone = time.monotonic() - killed if None not in statuses else float("inf")
        stderr = job.stderr
        # Where the model is not what it must be, they have left without what the victim owed them.
        if not {*statuses} - {0, -signal.SIGKILL} and outcome(output_dir) == expected:
            return None
    taken = max(losses(output_dir), default=0)
    with forked(words, here, ranks) as job:
        resumed = job.wait(600)
        said = re.search(r"resumed from .*checkpoint-(\d+)", job.stdout)
        first = int(said[1]) if said else 0
        equal = set(resumed) == {0} and outcome(output_dir) == expected
        stderr += job.stderr if set(resumed) != {0} else ""
    trial = Trial(
        launcher=launcher,
        layout=layout,
        victim=victim,
        phase=phase,
        moment=moment,
        others_gone_s=round(gone, 2),
        named=_named(stderr, victim, launcher),
        resumed_from=first,
        lost_steps=taken - first,
        equal=equal,
    )
    if not trial.passed:
        print(f"{trial}\n{stderr}", file=sys.stderr)
    return trial


def _await_moment(job: Job, output_dir: Path, victim: int, phase: str, draw: random.Random) -> bool:
    """Returns in the phase, at a random moment of it; False where the run was over before it was seen in it."""
    reached = _conditions(job, output_dir, victim, draw.randint(1, STEPS - 1))[phase]
    end = time.monotonic() + 600
    while not reached():
        if set(job.wait(0)) == {0}:
            return False
        assert time.monotonic() < end and None in job.wait(0), f"{phase} was never reached\n{job.stderr}"
        time.sleep(0.001)
    time.sleep(draw.uniform(0, {"start": 3.0, "step": 0.2, "save": 0.01, "end": 0.05}[phase]))
    return True


def _conditions(job: Job, output_dir: Path, victim: int, step: int) -> dict[str, Callable[[], bool]]:
    def written(number: int) -> bool:
        return (output_dir / f"checkpoint-{number}" / "manifest.json").exists()

    return {
        "start": lambda: job.process(victim) is not None,
        "step": lambda: written(step),
        "save": lambda: (output_dir / f"checkpoint-{step}").exists() and not written(step),
        "end": lambda: written(STEPS),
    }


def _moment(output_dir: Path) -> str:
    """What the run has written by now."""
    saves = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    unfinished = [path.name for path in saves if not (path / "manifest.json").exists()]
    if unfinished:
        return f"inside {unfinished[-1]}"
    return f"after {saves[-1].name}" if saves else "before the first checkpoint"


def _named(stderr: str, victim: int, launcher: str) -> bool:
    """Our line, or torchrun's own where it was the faster one; and no line about another rank."""
    told = [int(rank) for line in re.findall(r"megalign: error: (.* died), so", stderr)
            for rank in re.findall(r"rank (\d+) \(", line)]  # fmt: skip
    if told:
        return told == [victim]
    root = re.search(r"Root Cause.*?rank\s+: (\d+)", stderr, re.DOTALL)
    return launcher == "torchrun" and root is not None and int(root[1]) == victim
