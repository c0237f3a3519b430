"""transformers' own callback protocol: its handler, state, control, progress bar and reporting integrations.

Here is only what they need of us: a view of our arguments with every attribute they read, the choice of
reporting integrations, and a progress bar that shows loss and reward.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)

from megalign.errors import UserError

__all__ = [
    "CallbackArguments",
    "CallbackHandler",
    "DefaultFlowCallback",
    "LossProgressCallback",
    "PrinterCallback",
    "TrainerControl",
    "TrainerState",
    "make_handler",
]


class CallbackArguments:
    """The `args` that a transformers callback sees: our config's fields over TrainingArguments' defaults."""

    def __init__(self, config: Any, *, process_index: int, local_process_index: int, world_size: int) -> None:
        self._config = config
        # What transformers itself would use for a field that our configs lack: hub_*, metric_for_best_model ...
        vars(self).update(_defaults(TrainingArguments))
        vars(self).update({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
        self.process_index = process_index
        self.local_process_index = local_process_index
        self.world_size = world_size
        self.train_batch_size = config.per_device_train_batch_size
        self.eval_batch_size = config.per_device_eval_batch_size
        self.should_save = self.should_log = process_index == 0
        self.n_gpu = 1
        if self.run_name is None:
            self.run_name = config.output_dir
        if self.eval_steps is None:  # transformers' rule
            self.eval_steps = config.logging_steps
        # 10.0 would be shown as such in trainer_state.json, and step % 10.0 is a float.
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            setattr(self, name, int(value) if value >= 1 else value)

    def to_dict(self) -> dict[str, Any]:
        """Our config's fields as plain values."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self._config).items()}

    def to_json_string(self) -> str:
        """What TensorBoard shows as the run's arguments."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """The fields as values that a table of hyper-parameters can hold."""
        values = self.to_dict()
        return {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in values.items()}


class LossProgressCallback(ProgressCallback):
    """transformers' progress bar with loss and reward beside it; evaluations are lines above it."""

    shown = ("loss", "reward", "kl", "learning_rate")

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts a training log's main numbers beside the bar; without a bar (evaluate() after train()) prints it."""
        if not state.is_world_process_zero or logs is None:
            return
        if self.training_bar is None:
            print({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in logs.items()})
            return
        shown = {name: f"{logs[name]:.4g}" for name in self.shown if isinstance(logs.get(name), float)}
        if "loss" in logs:
            self.training_bar.set_postfix(shown)
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)


def make_handler(
    config: Any,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None,
    *,
    is_world_zero: bool,
    model: Any,
    processing_class: Any,
) -> CallbackHandler:
    """Flow control and the user's callbacks on every rank; progress and reporting on the first only."""
    chosen: list[Any] = [DefaultFlowCallback]
    if is_world_zero:
        chosen += _reporting(config.report_to)
    chosen += list(callbacks or [])
    if is_world_zero:
        chosen.append(PrinterCallback if config.disable_tqdm else LossProgressCallback)
    return CallbackHandler(chosen, model, processing_class, optimizer=None, lr_scheduler=None)


def _reporting(report_to: str | Sequence[str] | None) -> list[TrainerCallback]:
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if names in (["none"], []):
        return []
    try:
        classes = get_reporting_integration_callbacks(names[0] if names == ["all"] else names)
        return [made() for made in classes]
    except (ValueError, RuntimeError) as error:  # unknown name; package not installed
        raise UserError(f"report_to={names}: {error}; report_to=none goes without") from error


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields, where they have one."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _plain(value: Any) -> Any:
    """A value that json can hold."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
