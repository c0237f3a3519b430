"""The parts of a step's time add up to it."""

from __future__ import annotations

import time

import pytest

from megalign.trainers.phases import Phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_block_inside_another_is_counted_once(clock: list[float]) -> None:
    phases = Phases()
    phases.begin_step()
    clock[0] += 1
    with phases("data"):
        clock[0] += 2
        with phases("reference"):
            clock[0] += 4
        clock[0] += 8
    clock[0] += 16
    assert phases.end_step() == {
        "perf/data_s": 10.0, "perf/reference_s": 4.0, "perf/other_s": 17.0, "step_time": 31.0,
        "perf/between_steps_s": 0.0,
    }  # fmt: skip


def test_a_step_starts_afresh_and_knows_the_names(clock: list[float]) -> None:
    phases = Phases()
    phases.begin_step()
    with phases("generation"):
        clock[0] += 3
    phases.end_step()
    with phases("save"):  # between two steps
        clock[0] += 5
    phases.begin_step()
    clock[0] += 1
    assert phases.end_step() == {
        "perf/generation_s": 0.0, "perf/save_s": 0.0, "perf/other_s": 1.0, "step_time": 1.0,
        "perf/between_steps_s": 5.0,
    }  # fmt: skip


def test_a_resumed_run_knows_the_names(clock: list[float]) -> None:
    phases = Phases()
    phases.begin_step()
    with phases("generation"):
        clock[0] += 3
    resumed = Phases()
    resumed.restore(phases.names)
    clock[0] += 7
    resumed.begin_step()
    assert resumed.end_step()["perf/generation_s"] == 0.0 == resumed.end_step()["perf/between_steps_s"]


def test_a_block_that_fails_is_left(clock: list[float]) -> None:
    phases = Phases()
    phases.begin_step()
    with pytest.raises(ValueError, match="bad"), phases("reward"):
        clock[0] += 2
        raise ValueError("bad")
    clock[0] += 1
    ended = phases.end_step()
    assert (ended["perf/reward_s"], ended["perf/other_s"], ended["step_time"]) == (2.0, 1.0, 3.0)
