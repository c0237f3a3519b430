"""A run with skip_bad_rows is the run on the good rows, and its first line of metrics counts the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import TinyModels
from tests.trainers.runs import metric_lines, token_rows, train_sft


def test_bad_rows_are_counted_once_on_every_rank(tmp_path: Path, tiny_models: TinyModels) -> None:
    good = token_rows(8)
    bad = [{"input_ids": [5, 6, 101], "completion_mask": [1, 1, 1]}, {"input_ids": [5, 6], "completion_mask": [1]}]
    rows = [*good[:3], bad[0], *good[3:], bad[1]]
    fields = {"output_dir": str(tmp_path / "bad"), "skip_bad_rows": True, "max_steps": 2}
    found = run_ranks(2, train_sft, tiny_models["llama"], rows, fields)
    whole = {**fields, "output_dir": str(tmp_path / "good"), "per_device_train_batch_size": 4}
    (alone,) = run_ranks(1, train_sft, tiny_models["llama"], good, whole)
    for rank in found:
        assert [line.get("skipped_rows") for line in rank["history"]] == [2, None, None]
    assert [line.get("skipped_rows") for line in metric_lines(tmp_path / "bad")] == [2, None]
    losses = [line["loss"] for line in alone["history"][:2]]
    assert [line["loss"] for line in found[0]["history"][:2]] == pytest.approx(losses, abs=1e-5)
