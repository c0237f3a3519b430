"""Which checkpoint a run goes on from, and whose model is in its directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from megalign.errors import UserError
from megalign.trainers.manifest import checkpoints, find_checkpoint
from tests.ranks import run_ranks
from tests.trainers.resume_runs import ROWS, saving_fields
from tests.trainers.runs import digest, metric_lines, train_sft


def test_a_finished_run_is_not_trained_again(model: str, tmp_path: Path) -> None:
    fields = saving_fields(tmp_path)
    (first,) = run_ranks(1, train_sft, model, ROWS, fields)
    (second,) = run_ranks(1, train_sft, model, ROWS, fields, {"resume": "latest"})
    assert second["output"].global_step == 6
    assert second["events"] == ["on_init_end"]
    assert "the run is finished" in second["said"]
    (tmp_path / "config.json").unlink()  # killed between the last checkpoint and the model
    run_ranks(1, train_sft, model, ROWS, fields, {"resume": "latest"})
    assert (tmp_path / "config.json").exists()
    assert second["digest"] == first["digest"]


class _Dies(TrainerCallback):
    """At the end of a step or of the training, before anything is written; stands for kill -9."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the step, if one is given."""
        if state.global_step == self.step:
            raise UserError("killed")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end."""
        raise UserError("killed")


def _killed(path: str, fields: dict[str, Any], given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="killed"):
        train_sft(path, ROWS, fields, given)


def test_a_model_of_an_earlier_step_is_not_taken_for_the_finished_runs(model: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)  # with the model of step 3
    before = json.loads((tmp_path / "run.json").read_text())
    run_ranks(1, _killed, model, saving_fields(tmp_path), {"resume": "latest", "stop": _Dies()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"run": before["run"]}
    assert digest(tmp_path) == digest(made)
    (found,) = run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path), {"resume": "latest"})
    assert "does not have the model of that step: it is written now" in found["said"]
    (written,) = run_ranks(
        1, train_sft, model, ROWS, saving_fields(tmp_path / "to"), {"resume": f"{tmp_path}/checkpoint-6"}
    )
    assert found["digest"] == written["digest"] != digest(made)
    after = json.loads((tmp_path / "run.json").read_text())
    assert (after["run"], after["model"]["step"], before["model"]["step"]) == (before["run"], 6, 3)


def test_a_run_that_died_before_it_saved_does_not_go_on_from_another_runs_checkpoint(
    model: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    fields = saving_fields(tmp_path, logging_steps=1, max_steps=2, save_steps=2)
    run_ranks(1, _killed, model, fields, {"stop": _Dies(1)})
    assert find_checkpoint(str(tmp_path), "latest") is None
    (found,) = run_ranks(1, train_sft, model, ROWS, fields, {"resume": "latest"})
    told = f"checkpoint-3 in {tmp_path} is of an earlier run: training starts afresh"
    assert told in found["said"] and f"resume_from_checkpoint={tmp_path}/checkpoint-3 goes on" in found["said"]
    assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2]
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-2"


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(model: str, tmp_path: Path) -> None:
    (result,) = run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path), {"resume": "latest"})
    assert result["output"].global_step == 6
    assert f"no checkpoint in {tmp_path} yet" in result["said"]


def test_only_the_newest_checkpoints_are_kept(model: str, tmp_path: Path) -> None:
    run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path, save_steps=1, save_total_limit=2))
    assert [path.name for path in checkpoints(str(tmp_path))] == ["checkpoint-5", "checkpoint-6"]


def test_an_earlier_longer_run_in_the_directory_is_not_the_latest(model: str, tmp_path: Path) -> None:
    run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path, max_steps=6, save_steps=6))
    run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path, max_steps=3, save_steps=1, save_total_limit=2))
    assert [path.name for path in checkpoints(str(tmp_path))] == ["checkpoint-2", "checkpoint-3"]
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-3"


def test_a_checkpoint_without_manifest_is_not_the_latest(model: str, tmp_path: Path) -> None:
    run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path, save_steps=2))
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-4"
    with pytest.raises(UserError, match="checkpoint-6 has no manifest.json"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-6"))
