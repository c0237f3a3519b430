"""What may not change between a run and its continuation is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import save_tiny_model
from tests.trainers.resume_runs import ROWS, resume_error, saving_fields


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps x data-parallel ranks is 2 but .* with 4"),
        ({"seed": 7}, "seed is 7 but .* was made with 42"),
        ({"max_length": 8}, "max_length is 8 but .* was made with 1024"),
        ({"completion_only_loss": False}, "train_dataset is 14 rows .* but .* was made with 14 rows"),
        ({"bf16": True}, "params_dtype_name is bfloat16 but .* was made with float32"),
    ],
)
def test_other_data_or_steps_are_named(model: str, made: Path, changed: dict[str, Any], message: str) -> None:
    (error,) = run_ranks(1, resume_error, model, saving_fields(made, **changed))
    assert re.search(message, error), error


def test_another_row_in_the_middle_is_noticed(model: str, made: Path) -> None:
    rows = [*ROWS[:6], ROWS[7], *ROWS[7:]]
    (error,) = run_ranks(1, resume_error, model, saving_fields(made), rows)
    assert re.search("train_dataset is 14 rows .* but .* was made with 14 rows", error), error


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 64}, "model.hidden_size is 64 but .* was made with 32"),
        ({"rms_norm_eps": 1e-3}, "model.norm_epsilon is 0.001 but .* was made with 1e-06"),
    ],
)
def test_another_model_is_named(changed: dict[str, Any], message: str, made: Path, tmp_path: Path) -> None:
    (error,) = run_ranks(1, resume_error, save_tiny_model("llama", tmp_path, **changed), saving_fields(made))
    assert re.search(message, error), error
