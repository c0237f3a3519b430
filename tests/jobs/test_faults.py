"""Jobs whose ranks are killed, asked to stop, or stand still; and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.jobs import trials
from tests.jobs.forked import ForkedJob, forked_job
from tests.jobs.inputs import save_model, sums, write_rows
from tests.jobs.start import error_lines
from tests.trainers.runs import digest, metric_lines

TP2 = ["--tensor_model_parallel_size", 2]
STEPS = 8


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("somewhere")
    save_model(path / "model")
    write_rows(path / "rows.jsonl", sums(40))
    return path


@pytest.mark.parametrize(
    ("layout", "victim", "phase"), [("DP2", 0, "step"), ("TP2", 1, "save"), ("PP2", 1, "start")], ids=str
)
def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_save(
    layout: str, victim: int, phase: str, here: Path
) -> None:
    draw = random.Random(victim)
    # None: its moment was over before it was seen, or the job was; as in tools/fault_trials.py another one is drawn.
    drawn = (trials.run_trial("forked", layout, victim, phase, here, draw) for _ in range(3))
    trial = next(filter(None, drawn), None)
    assert trial is not None and trial.passed, trial


# ---- stops


def words(output_dir: str, *more: object, **changes: object) -> list[object]:
    fields = {
        "model_name_or_path": "model",
        "dataset_name": "rows.jsonl",
        "output_dir": output_dir,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_steps": 100,
        "disable_tqdm": True,
        "resume_from_checkpoint": "latest",
        **changes,
    }
    return ["sft", *(word for name, value in fields.items() for word in (f"--{name}", value)), *more]


class Waits(TrainerCallback):
    """A step is in its middle until a request has been made."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells that the step has begun, and goes on with it when it is told to."""
        if state.global_step == self.number:
            (Path(args.output_dir) / "began").touch()
            end = time.monotonic() + 60
            while not (Path(args.output_dir) / "go").exists():
                assert time.monotonic() < end
                time.sleep(0.01)


def waits(number: int) -> None:
    """Every trainer of the process gets the callback."""
    add_callback(Waits(number))


def add_callback(callback: TrainerCallback) -> None:
    from megalign.trainers import base

    begin = base.Run.begin

    def begin_with(run: Any, plan: Any) -> None:
        begin(run, plan)
        run.handler.add_callback(callback)

    base.Run.begin = begin_with


@contextlib.contextmanager
def in_step(number: int, name: str, here: Path, *more: object) -> Iterator[ForkedJob]:
    """A job on two tensor ranks, in the middle of its step of that number, from 0 on, until there is a file `go`."""
    with forked_job(words(name, *TP2, *more), here, first=partial(waits, number)) as job:
        end = time.monotonic() + 120
        while not (here / name / "began").exists():
            assert time.monotonic() < end, job.stderr
            time.sleep(0.01)
        yield job


def send(name: str, rank: int) -> Callable[[ForkedJob, Path], None]:
    return lambda job, output_dir: os.kill(job.process(rank), getattr(signal, name))


REQUESTS = {
    "SIGTERM": send("SIGTERM", 0),
    "SIGUSR1": send("SIGUSR1", 1),  # one rank alone, and not the first
    "STOP": lambda job, output_dir: (output_dir / "STOP").touch(),
}


@pytest.fixture(scope="module")
def whole(here: Path) -> Path:
    """The output of a run that nobody stops."""
    with forked_job(words("whole", *TP2), here) as job:
        assert job.wait(120) == [0, 0], job.stderr
    return here / "whole"


def losses(output_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metric_lines(output_dir) if "loss" in line}


@pytest.mark.parametrize("cause", REQUESTS)
def test_a_request_to_stop_saves_the_step_on_all_ranks_and_the_next_start_goes_on(
    cause: str, here: Path, whole: Path
) -> None:
    output_dir = here / f"asked by {cause}"
    more = ["--async_save", True] if cause == "STOP" else []  # what is being written then is written to its end
    with in_step(3, output_dir.name, here, *more) as job:
        REQUESTS[cause](job, output_dir)
        (output_dir / "go").touch()
        assert job.wait(60) == [0, 0], job.stderr
        assert error_lines(job.stderr) == []
        assert f"megalign: stopped after step 4, as {cause} asked: checkpoint-4 is written" in job.stdout
    assert [path.parent.name for path in output_dir.glob("checkpoint-*/manifest.json")] == ["checkpoint-4"]
    assert metric_lines(output_dir)[-1].items() >= {"step": 4, "stopped": cause}.items()
    assert not (output_dir / "config.json").exists() and not (output_dir / "STOP").exists()
    with forked_job(words(output_dir.name, *TP2), here) as job:
        assert job.wait(120) == [0, 0], job.stderr
    assert losses(output_dir) == losses(whole) and digest(output_dir) == digest(whole)


# ---- standing still


class Sleeps(TrainerCallback):
    """The second rank never comes back from its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sleeps."""
        if args.process_index == 1 and state.global_step == 2:
            self.sleep_for_ever()

    def sleep_for_ever(self) -> None:
        """A name to look for in the stack."""
        time.sleep(600)


def sleeps() -> None:
    """Every trainer of the process gets the callback."""
    add_callback(Sleeps())


def test_a_rank_that_stands_still_ends_the_job_with_every_ranks_stack(here: Path) -> None:
    with forked_job(words("hangs", *TP2, ddp_timeout=3), here, first=sleeps) as job:
        assert job.wait(60) == [1, 1], job.stderr
        (line,) = error_lines(job.stderr)
    assert "has stood still for 3 s (ddp_timeout) at " in line and "hangs/stacks" in line
    files = [here / "hangs" / "stacks" / f"rank_{rank:05d}.txt" for rank in (0, 1)]
    stacks = [file.read_text().partition("\n")[2] for file in files]  # behind the reason
    assert "in sleep_for_ever" in stacks[1] and "sleep_for_ever" not in stacks[0]
    assert "in any_rank" in stacks[0]  # where it waits for the other


# ---- steps without a finite gradient


def poisoned(step: int | None = None) -> None:
    """The loss of the second rank is infinite, in one step or in all from the second on."""
    from megalign.trainers import sft

    sound = sft.sft_loss

    def loss(columns: Any, batch: Any, counts: Any, **options: Any) -> Any:
        value, metrics = sound(columns, batch, counts, **options)
        begun.append(batch)
        bad = os.environ["RANK"] == "1" and (len(begun) == step if step else len(begun) > 1)
        return value + (float("inf") if bad else 0.0), metrics

    begun: list[Any] = []
    sft.sft_loss = loss


def test_rows_and_learning_rate_go_on_over_a_skipped_step(here: Path) -> None:
    with forked_job(words("skips one", logging_steps=1), here, first=partial(poisoned, 2)) as job:
        assert job.wait(60) == [0, 0], job.stderr
    lines = metric_lines(here / "skips one")
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * (1 - n / 8) for n in range(8)])
    assert [line.get("skipped_steps") for line in lines] == [None, *[1] * 7]
    assert [line["step"] for line in lines if line["loss"] is None] == [2]
    tokens = [line["num_tokens"] for line in lines]
    assert tokens == sorted(set(tokens))


def test_too_many_skipped_steps_save_and_end_the_job(here: Path) -> None:
    fields = {"max_skipped_steps": 2, "logging_steps": 1, "shuffle_dataset": False}
    with forked_job(words("skips", **fields), here, first=poisoned) as job:
        assert job.wait(60) == [2, 2], job.stderr
        stderr = job.stderr
    (line,) = error_lines(stderr)
    assert "3 steps in a row were skipped" in line and "max_skipped_steps is 2" in line and "checkpoint-4" in line
    (told,) = [line for line in stderr.splitlines() if "step 2 is skipped" in line]
    rows = "12, 13, 14, 15"  # the second step's of the second rank
    assert told.startswith("megalign: step 2 is skipped, no weight has changed: loss inf, gradient norm ")
    assert told.endswith(f", not finite in microbatches of dataset rows {rows}"), told
    assert json.loads((here / "skips" / "checkpoint-4" / "manifest.json").read_text())["step"] == 4
    lines = metric_lines(here / "skips")
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 2, 3]


# ---- under torchrun


@contextlib.contextmanager
def under_torchrun(output_dir: Path, here: Path) -> Iterator[trials.Started]:
    with trials.torchrun(words(output_dir.name, *TP2, max_steps=100_000), here, 2) as job:
        end = time.monotonic() + 200
        while not (output_dir / "metrics.jsonl").exists():
            assert time.monotonic() < end and job.wait(0) == [None], job.stderr
            time.sleep(0.05)
        yield job


def test_torchruns_sigterm_is_a_request_to_stop(here: Path) -> None:
    output_dir = here / "torchrun"
    with under_torchrun(output_dir, here) as job:
        os.kill(job.launcher, signal.SIGTERM)
        assert job.wait(60) == [1], job.stderr
        assert error_lines(job.stderr) == []
    *_, last = metric_lines(output_dir)
    assert last["stopped"] == "SIGTERM"
    (manifest,) = output_dir.glob("checkpoint-*/manifest.json")
    assert json.loads(manifest.read_text())["step"] == last["step"]
