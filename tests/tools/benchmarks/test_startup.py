"""The start, up to the first step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megalign.errors import UserError
from tests.jobs.inputs import save_model
from tests.ranks import run_ranks
from tools import benchmark
from tools.benchmarks import first_step, startup


def test_an_entry_of_each_start() -> None:
    marks = [first_step.Marks(total, 0.1, 2.0, loading, 1.5)._asdict() for total, loading in ((6.0, 1.0), (9.0, 5.0))]
    slower = [{**one, "total": 2 * one["total"]} for one in marks]
    ours, trls = startup.summarize(startup.FIRST_STEP, {"megalign": marks, "trl": slower})
    assert ours["median_s"] == 7.5 and ours["ratio"] == 2.0 and trls["ratio"] == 1.0
    assert ours["besides_loading_s"] == 4.5 and ours["loading_s"] == 3.0 and ours["imports_s"] == 2.0
    (helped, _) = startup.summarize(startup.HELP, {"megalign": [{"total": 0.2}], "trl": [{"total": 4.0}]})
    assert helped["ratio"] == 20.0 and helped["besides_loading_s"] is None


def first_marks(engine: str, model: str) -> Sequence[float]:
    """On a rank: the marks of a first step."""
    found: list[first_step.Marks] = []

    class Told(BaseException):
        pass

    def tell(marks: first_step.Marks) -> None:
        found.append(marks)
        raise Told

    options = benchmark.parse_arguments(["startup", "--model", model, "--dtype", "float32", "--batch", "2"])
    options.job = "sft"
    try:
        first_step.measure(engine, first_step.STARTED - 0.5, options, tell)
    except Told:
        return found[0]
    raise AssertionError("no step was taken")


@pytest.mark.parametrize("engine", startup.ENGINES)
def test_where_the_time_of_a_first_step_goes(engine: str, tmp_path: Path) -> None:
    (marks,) = run_ranks(1, first_marks, engine, save_model(tmp_path / "model"), fresh=True)
    assert marks.interpreter == pytest.approx(0.5) and marks.loading > 0 and marks.step > 0
    assert marks.total > marks.interpreter + marks.imports + marks.loading + marks.step


def test_a_help_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(startup._HELP, "trl", [sys.executable, "-c", "raise SystemExit('nothing there')"])
    with pytest.raises(UserError, match="ended with 1: nothing there"):
        startup.seconds_of_help("trl")
