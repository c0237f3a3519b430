"""transformers' callbacks get what they expect of us."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from megalign.callbacks import (
    CallbackArguments,
    DefaultFlowCallback,
    LossProgressCallback,
    PrinterCallback,
    make_handler,
)
from megalign.config import GRPOConfig, SFTConfig
from megalign.errors import UserError


def _view(config: Any) -> CallbackArguments:
    return CallbackArguments(config, process_index=1, local_process_index=1, world_size=4)


def test_the_view_has_every_field_of_training_arguments(tmp_path: Path) -> None:
    view, theirs = _view(SFTConfig(output_dir=str(tmp_path))), TrainingArguments(output_dir=str(tmp_path))
    missing = [name for name in vars(theirs) if not name.startswith("_") and not hasattr(view, name)]
    # What belongs to their own set-up of devices and accelerate.
    assert set(missing) == {"mixed_precision", "distributed_state", "fsdp_plugin_args", "deepspeed_plugin"}


def test_the_view_shows_our_values_where_we_have_the_field() -> None:
    view = _view(GRPOConfig(learning_rate=3e-4, logging_steps=5, eval_strategy="steps", save_strategy="epoch"))
    assert (view.learning_rate, view.logging_steps, view.num_generations) == (3e-4, 5, 8)
    assert view.eval_strategy == IntervalStrategy.STEPS and view.save_strategy == SaveStrategy.EPOCH
    assert view.eval_steps == 5  # transformers' rule when it is not given
    assert (view.process_index, view.world_size, view.should_save) == (1, 4, False)


def test_the_views_dictionaries_are_plain() -> None:
    config = GRPOConfig(generation_kwargs={"stop": ["x"]})
    assert json.loads(_view(config).to_json_string())["generation_kwargs"] == {"stop": ["x"]}
    flat = _view(config).to_sanitized_dict()
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def _handler(config: Any, *, is_world_zero: bool) -> list[type]:
    handler = make_handler(config, None, is_world_zero=is_world_zero, model=None, processing_class=None)
    return [type(callback) for callback in handler.callbacks]


def test_only_the_first_rank_shows_and_reports() -> None:
    from transformers.integrations import TensorBoardCallback

    config = SFTConfig(report_to=["tensorboard"])
    shown = [DefaultFlowCallback, TensorBoardCallback, LossProgressCallback]
    assert _handler(config, is_world_zero=True) == shown
    assert _handler(config, is_world_zero=False) == [DefaultFlowCallback]


def test_without_a_progress_bar_lines_are_printed() -> None:
    assert _handler(SFTConfig(disable_tqdm=True), is_world_zero=True) == [DefaultFlowCallback, PrinterCallback]


def test_all_reports_to_what_is_installed() -> None:
    from transformers.integrations import TensorBoardCallback

    assert TensorBoardCallback in _handler(SFTConfig(report_to=["all"]), is_world_zero=True)


def test_an_unknown_reporter_is_named() -> None:
    with pytest.raises(UserError, match="report_to=.*'paper'.*not supported.*report_to=none"):
        _handler(SFTConfig(report_to=["paper"]), is_world_zero=True)


def test_the_progress_bar_shows_loss_and_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    progress, control = LossProgressCallback(), TrainerControl()
    state = TrainerState(max_steps=4, global_step=2)
    progress.on_train_begin(None, state, control)
    progress.on_step_end(None, state, control)
    progress.on_log(None, state, control, logs={"loss": 0.12345, "reward": 0.5, "entropy": 1.0})
    progress.on_log(None, state, control, logs={"eval_reward": 0.75})
    progress.on_train_end(None, state, control)
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    progress.on_log(None, state, control, logs={"eval_reward": 0.876543})  # evaluate() after train(): there is no bar
    assert out.getvalue() == "{'eval_reward': '0.8765'}\n"
    shown = screen.getvalue()
    assert "loss=0.1235" in shown.replace(" ", "") or "loss=0.1234" in shown.replace(" ", "")
    assert "reward=0.5" in shown and "2/4" in shown
