"""metrics.jsonl, the logging window and the table of completions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megalign.trainers.reporting import (
    MetricsFile,
    MetricsWindow,
    print_completions,
    unique_prompts,
    write_completions,
)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_window_is_the_mean_over_its_steps() -> None:
    window = MetricsWindow()
    window.add({"loss": 1.0, "reward": 0.5})
    window.add({"loss": 2.0})
    window.set(num_tokens=7)
    window.set(num_tokens=9)
    assert window.drain() == {"loss": 1.5, "reward": 0.5, "num_tokens": 9}
    assert window.drain() == {}


def test_parts_of_a_step_add_up_to_it_when_one_comes_late_or_goes() -> None:
    window = MetricsWindow()
    window.add_parts({"perf/other_s": 3.0, "step_time": 3.0}, whole="step_time")
    window.add_parts({"perf/update_s": 4.0, "perf/other_s": 1.0, "step_time": 5.0}, whole="step_time")
    resumed = MetricsWindow()
    resumed.restore(window.state())
    resumed.add_parts({"perf/update_s": 1.0, "step_time": 1.0}, whole="step_time")
    assert resumed.drain() == pytest.approx({"perf/update_s": 5 / 3, "perf/other_s": 4 / 3, "step_time": 3.0})
    resumed.add_parts({"perf/update_s": 1.0, "step_time": 1.0}, whole="step_time")
    assert resumed.drain() == {"perf/update_s": 1.0, "step_time": 1.0}


def test_what_did_not_apply_leaves_the_mean_alone_but_a_broken_loss_shows() -> None:
    window = MetricsWindow()
    window.add({"rewards/f/mean": math.nan, "clip_ratio/low_min": math.inf, "rewards/g/mean": math.nan, "loss": 1.0})
    window.add({"rewards/f/mean": 0.5, "clip_ratio/low_min": 0.25, "rewards/g/mean": math.nan, "loss": math.nan})
    line = window.drain()
    assert line["rewards/f/mean"] == 0.5
    assert line["clip_ratio/low_min"] == 0.25
    assert line["rewards/g/mean"] is None
    assert math.isnan(line["loss"])


def test_metrics_file_holds_full_floats_one_line_each(tmp_path: Path) -> None:
    file = MetricsFile(str(tmp_path), active=True)
    file.append({"step": 1, "loss": 1 / 3})
    file.append({"step": 2, "loss": 1e-17})
    assert _lines(tmp_path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 1e-17}]


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    file = MetricsFile(str(tmp_path), active=True)
    file.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-3, "rewards/f/mean": None})
    nothing = {"loss": None, "grad_norm": None, "rewards/f/mean": None}
    assert _lines(tmp_path) == [{"step": 1, "learning_rate": 1e-3, **nothing}]


def test_a_fresh_run_drops_an_earlier_runs_lines_and_keeps_its_own(tmp_path: Path) -> None:
    MetricsFile(str(tmp_path), active=True).append({"step": 9})
    file = MetricsFile(str(tmp_path), active=True)
    file.append({"step": 0, "eval_loss": 1.0})
    file.start_afresh()
    file.append({"step": 1})
    assert [line["step"] for line in _lines(tmp_path)] == [0, 1]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    MetricsFile(str(tmp_path), active=True).append({"step": 1})
    MetricsFile(str(tmp_path), active=True).append({"step": 2})
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]


def test_a_run_that_goes_on_drops_what_it_will_tell_again(tmp_path: Path) -> None:
    file = MetricsFile(str(tmp_path), active=True)
    told = [
        {"step": 2, "loss": 1.0},
        {"step": 4, "eval_loss": 1.0},
        {"step": 4, "loss": 1.0},  # at the epoch's end, after the checkpoint
        {"step": 5, "eval_loss": 1.0},
    ]
    for line in told:
        file.append(line)
    with file.path.open("a") as end:
        end.write('{"step": 1, "lo')
    MetricsFile(str(tmp_path), active=False).go_on_after(0, logged_step=0)
    assert len(file.path.read_text().splitlines()) == len(told) + 1
    MetricsFile(str(tmp_path), active=True).go_on_after(4, logged_step=2)
    assert _lines(tmp_path) == told[:2]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    MetricsFile(str(tmp_path), active=False).append({"step": 1})
    assert not (tmp_path / "metrics.jsonl").exists()


TABLE = {
    "prompt": [[{"role": "user", "content": "1 + 1?"}]] * 2 + ["[red]plain"] * 2,
    "completion": ["2", "3", "a", "b"],
    "accuracy": [1.0, 0.0, math.nan, 0.5],
    "source": ["x", None, 3, "y"],
    "advantage": [1.0, -1.0, 0.0, 0.0],
}


def test_completions_are_a_parquet_file_by_step(tmp_path: Path) -> None:
    table = {**TABLE, "prompt": ["p"] * 4}
    path = write_completions(str(tmp_path), 12, table)
    assert path == tmp_path / "completions" / "completions_00012.parquet"
    read = pq.read_table(path).to_pydict()
    assert list(read) == ["step", "prompt", "completion", "accuracy", "source", "advantage"]
    assert read["step"] == [12] * 4
    assert read["completion"] == TABLE["completion"]
    assert read["source"] == ["x", None, "3", "y"]


def test_completions_are_written_without_a_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_completions(str(tmp_path), 12, TABLE | {"prompt": ["p"] * 4})
    assert capsys.readouterr().err == ""


def test_completions_of_conversations_keep_their_messages(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "1 + 1?"}]
    path = write_completions(str(tmp_path), 1, {"prompt": [conversation], "completion": ["2"]})
    assert pq.read_table(path).to_pydict()["prompt"] == [conversation]


def test_printed_completions_show_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_completions(7, TABLE, limit=None)
    shown = capsys.readouterr().out
    assert "Step 7" in shown
    assert "[red]pl" in shown  # not taken for markup


def test_printed_completions_are_limited(capsys: pytest.CaptureFixture[str]) -> None:
    table = {"prompt": [f"prompt{row}" for row in range(9)]}
    print_completions(7, table, limit=3)
    assert capsys.readouterr().out.count("prompt") == 3 + 1  # and the heading


def test_unique_prompts_keep_the_first_completion_of_each() -> None:
    assert unique_prompts(TABLE)["completion"] == ["2", "a"]
