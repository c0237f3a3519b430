"""The pipeline's idle share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalign.errors import UserError
from tests.jobs.inputs import save_model
from tools.benchmarks import pipeline


@pytest.mark.parametrize(
    ("name", "microbatches", "share"),
    [("pp2", 8, 1 / 9), ("pp4", 8, 3 / 11), ("pp2xvpp2", 8, 1 / 17), ("pp4xvpp2", 8, 3 / 19)],
)
def test_what_the_schedules_promise(name: str, microbatches: int, share: float) -> None:
    assert pipeline.Layout.named(name).idle_share(microbatches) == pytest.approx(share)


def test_idle_is_what_ranks_did_not_spend_in_passes() -> None:
    step = pipeline.Step.of([pipeline.Work(1.0, 9.0, 6.0, 2.0), pipeline.Work(3.0, 11.0, 8.0, 3.0)])
    assert step == (10.0, pytest.approx(0.3), 5.0)
    entry = pipeline.summarize(pipeline.Layout(2), [step, step], [step._replace(cpu_seconds=4.0)] * 2, 8)
    assert entry["idle"] == pytest.approx(0.3) and entry["idle_ratio"] == pytest.approx(2.7)
    assert entry["cpu_ratio"] == 1.25


def test_layers_and_microbatches_must_fit_the_schedule(tmp_path: Path) -> None:
    model = Path(save_model(tmp_path))
    options = argparse.Namespace(microbatches=6)
    with pytest.raises(UserError, match="4 layers .* do not divide by PP4xVPP2"):
        pipeline.check([pipeline.Layout(4, 2, sleeps=True)], model, options)
    with pytest.raises(UserError, match="--microbatches 6 must be a multiple of 4"):
        pipeline.check([pipeline.Layout(4, 1), pipeline.Layout(4, 2)], Path(pipeline.save_model(tmp_path)), options)


def test_ranks_compute_and_sleep(measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--microbatches", 2, "--tokens", 8, "--sleep-ms", 20, "--layouts", "pp2xvpp2"]
    entries, _ = measured("pipeline", *words)
    assert [(entry["layout"], entry["stages"], entry["chunks"]) for entry in entries] == [
        ("one rank, layers compute", 1, 1),
        ("PP2, layers compute", 2, 1),
        ("PP2xVPP2, layers sleep", 2, 2),
    ]
    assert [entry["promised_idle"] for entry in entries] == [None, pytest.approx(1 / 3), pytest.approx(1 / 5)]
    assert all(0 <= entry["idle"] < 1 and entry["cpu_s"] > 0 for entry in entries)
    assert entries[0]["idle"] < 0.2 and entries[1]["cpu_ratio"] > 0.2 and entries[2]["cpu_ratio"] is None
    # Each rank slept through two chunks of two layers in each pass of two microbatches, and computed next to nothing.
    assert entries[2]["median_s"] * (1 - entries[2]["idle"]) >= 2 * 4 * 0.06
