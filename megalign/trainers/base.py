"""Trainer: the loop that all trainers share. Steps, epochs, logging, evaluation and saving are transformers'.

A leaf prepares rows, makes the updates of an epoch and names its loss. The epoch's `updates` is a generator that
yields after each optimizer step; what happens between two steps is here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput, speed_metrics

from megalign import launch
from megalign.batch import Batch, Counts
from megalign.callbacks import CallbackArguments, TrainerControl, TrainerState, make_handler
from megalign.data.chat import load_tokenizer
from megalign.data.datasets import once_per_job
from megalign.errors import UserError
from megalign.parallel.control import any_rank
from megalign.parallel.groups import initialize
from megalign.train_engine import StepResult, TrainEngine
from megalign.trainers import checkpointing
from megalign.trainers.arguments import (
    as_dataset,
    check_callbacks,
    describe_rows,
    has_tokenizer,
    model_directory,
    refuse_arguments,
)
from megalign.trainers.reporting import MetricsFile, MetricsWindow
from megalign.trainers.schedule import LearningRate, plan_steps

LAYOUT_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "use_distributed_optimizer",
    "bf16",
)
DATA_FIELDS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "shuffle_dataset",
)


class Trainer:
    """What SFTTrainer and GRPOTrainer share; not used by itself."""

    config_class: ClassVar[type]
    refused_arguments: ClassVar[Mapping[str, str]] = {}
    data_fields: ClassVar[tuple[str, ...]] = DATA_FIELDS  # a resumed run must share their values
    num_examples: int = 0  # training rows

    def __init__(
        self,
        model: str | None = None,
        args: Any = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        **refused: Any,
    ) -> None:
        launch.report_uncaught()
        refuse_arguments(type(self), self.refused_arguments, refused)
        self.model_path = model_directory(model, args)
        self.args = args = args or self.config_class(output_dir=f"{Path(self.model_path).name}-{type(self).__name__}")
        self.groups = initialize(args, timeout_s=args.ddp_timeout)
        args.validate(self.groups.world.size)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise UserError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset; give one or eval_strategy=no")
        set_seed(args.seed)
        self._own_processing_class = processing_class
        self.processing_class = processing_class or self.load_tokenizer()
        self.train_rows = self._prepare(train_dataset, "train_dataset")
        self.eval_rows = self._prepare(eval_dataset, "eval_dataset")
        self.policy = TrainEngine(self.model_path, args, self.groups)
        self._start_reporting(check_callbacks(callbacks))

    # ---- what a leaf says

    def load_tokenizer(self) -> Any:
        """The tokenizer when none was given; None where rows may do without."""
        return load_tokenizer(self.model_path) if has_tokenizer(self.model_path) else None

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool) -> Dataset:
        """The rows that the trainer works on; called once in the job."""
        raise NotImplementedError

    def micro_steps_per_epoch(self) -> int:
        """Batches of `per_device_train_batch_size` rows a data-parallel rank takes in an epoch."""
        raise NotImplementedError

    def updates(self, epoch: int, first: int) -> Iterator[StepResult]:
        """Yields once for each optimizer step of the epoch, from its update number `first` on."""
        raise NotImplementedError

    def loss(self, *args: Any) -> Any:
        """The LossFn of the engine's train_step."""
        raise NotImplementedError

    def evaluation(self, rows: Dataset) -> dict[str, float]:
        """Metrics of the evaluation rows, without the eval_ prefix."""
        raise NotImplementedError

    def loop_state(self) -> dict[str, Any]:
        """What a leaf must keep to go on bitwise: tensors and plain values of this rank."""
        return {}

    def restore_loop_state(self, state: dict[str, Any]) -> None:
        """Takes `loop_state` back."""

    def on_logged(self) -> None:
        """Called on every rank after a training line is logged."""

    # ---- what a user calls

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains to max_steps or num_train_epochs, and leaves the model in Hugging Face form in output_dir."""
        if self.train_rows is None or len(self.train_rows) == 0:
            raise UserError("train_dataset has no rows to train on; pass train_dataset with at least one")
        self.plan = plan_steps(self.args, self.micro_steps_per_epoch())
        self.learning_rate = LearningRate(self.args, self.plan.max_steps)
        self._begin_state()
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self._resume(resume)
        started, first_step = time.time(), self.state.global_step
        if first_step >= self.plan.max_steps:
            self._say(f"the run is finished: checkpoint at step {first_step} of {self.plan.max_steps}")
            return TrainOutput(first_step, 0.0, {})
        self._event("on_train_begin")
        if self.args.eval_on_start:
            self.evaluate()
        while self.state.global_step < self.plan.max_steps and self._epoch < self.plan.num_epochs:
            self._run_epoch()
            if self.control.should_training_stop:
                break
        output = self._finish(started, first_step)
        self.save_model()
        return output

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float | None]:
        """The metrics of the evaluation rows under eval_* names; logged like transformers' Trainer does."""
        rows = self.eval_rows if eval_dataset is None else self._prepare(eval_dataset, "eval_dataset")
        if isinstance(rows, Mapping):
            parts = [self._evaluate(part, f"{metric_key_prefix}_{name}") for name, part in rows.items()]
            return {name: value for part in parts for name, value in part.items()}
        return self._evaluate(rows, metric_key_prefix)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model as a Hugging Face directory; called on every rank."""
        path = output_dir or self.args.output_dir
        self.policy.wake()
        self.policy.export(path)
        # The engine copies the model directory's own tokenizer files as they are.
        if self._own_processing_class is not None and self.state.is_world_process_zero:
            self._own_processing_class.save_pretrained(path)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """One more callback, as transformers' Trainer.add_callback."""
        self.handler.add_callback(callback)

    # ---- one optimizer step, called by the leaf

    def update(self, batches: list[Batch], counts: Counts | None = None) -> StepResult:
        """An optimizer step on this rank's microbatches, at the step's learning rate; its metrics are noted."""
        # Megatron's step is one with its backward pass, so this event comes before both.
        self._event("on_pre_optimizer_step")
        rate = self.learning_rate(self.state.global_step)
        result = self.policy.train_step(batches, self.loss, learning_rate=rate, counts=counts)
        self._event("on_optimizer_step")
        self.window.add({"loss": result.loss, **result.metrics})
        self.window.set(grad_norm=result.grad_norm, learning_rate=rate)
        self._loss_total += result.loss
        return result

    def note_tokens(self, count: int) -> None:
        """Counts tokens of the whole job, prompts included, into `num_tokens`."""
        self.state.num_input_tokens_seen += count
        self.window.set(num_tokens=self.state.num_input_tokens_seen)

    # ---- between two steps

    def _run_epoch(self) -> None:
        self._event("on_epoch_begin")
        updates = self.updates(self._epoch, self._update)
        for _ in range(self._update, self.plan.updates_per_epoch):
            started = time.perf_counter()
            self._event("on_step_begin")
            next(updates)
            self.window.add({"step_time": time.perf_counter() - started})
            self._update += 1
            self.state.global_step += 1
            self.state.epoch = self._epoch + self.plan.epoch_fraction(self._update)
            self._event("on_step_end")
            self._act()
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        updates.close()
        self._epoch, self._update = self._epoch + 1, 0
        self._event("on_epoch_end")
        self._act()

    def _act(self) -> None:
        """Logs, evaluates and saves as the callbacks decided; one rank's wish counts for all."""
        flags = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")
        agreed = any_rank([getattr(self.control, flag) for flag in flags], self.groups.world)
        for flag, value in zip(flags, agreed, strict=True):
            setattr(self.control, flag, value)
        if self.control.should_log and self.state.global_step > self._logged_step:
            self._log_training()
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self._save_checkpoint()
            self._event("on_save")

    def _evaluate(self, rows: Dataset | None, prefix: str) -> dict[str, float | None]:
        if rows is None or len(rows) == 0:
            raise UserError("evaluate() has no rows; pass eval_dataset to it or to the trainer")
        started = time.time()
        window = MetricsWindow()
        window.add(self.evaluation(rows))
        metrics = {f"{prefix}_{name}": value for name, value in window.drain().items()}
        metrics.update(speed_metrics(prefix, started, num_samples=len(rows)))
        self._log(dict(metrics))
        self.metrics_file.append({"step": self.state.global_step, **metrics})
        self._event("on_evaluate", metrics=metrics)
        return metrics

    def _log_training(self) -> None:
        line = self.window.drain()
        first = ("loss", "grad_norm", "learning_rate")
        line = {name: line[name] for name in first} | line
        self._logged_step = self.state.global_step
        self._log(line)
        self.metrics_file.append({"step": self.state.global_step, "epoch": self.state.epoch, **line})
        self.on_logged()

    def _log(self, logs: dict[str, Any]) -> None:
        """Into the history and to the callbacks, which get no None: TensorBoard would warn of each."""
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._event("on_log", logs={name: value for name, value in logs.items() if value is not None})

    def _finish(self, started: float, first_step: int) -> TrainOutput:
        steps = self.state.global_step - first_step
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.groups.dp.size
        metrics = speed_metrics("train", started, num_samples=steps * rows, num_steps=steps)
        metrics["train_loss"] = self._loss_total / max(steps, 1)
        self._log(dict(metrics))
        self._event("on_train_end")
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    # ---- rows, state, events, checkpoints

    def _prepare(self, dataset: Any, name: str) -> Any:
        if dataset is None:
            return None
        if name == "eval_dataset" and isinstance(dataset, Mapping):
            return {part: self._prepare(rows, name) for part, rows in dataset.items()}
        return once_per_job(
            lambda: self.tokenized(as_dataset(dataset, name), for_evaluation=name == "eval_dataset"),
            self.args.output_dir,
        )

    def _start_reporting(self, callbacks: Sequence[Any] | None) -> None:
        world = self.groups.world
        local = int(os.environ["LOCAL_RANK"])
        self._view = CallbackArguments(
            self.args, process_index=world.rank, local_process_index=local, world_size=world.size
        )
        self.state = TrainerState(is_world_process_zero=world.rank == 0, is_local_process_zero=local == 0)
        self.control = TrainerControl()
        self.handler = make_handler(
            self.args,
            callbacks,
            is_world_zero=world.rank == 0,
            model=self.policy,
            processing_class=self.processing_class,
        )
        self.window = MetricsWindow()
        self.metrics_file = MetricsFile(self.args.output_dir, active=world.rank == 0)
        self._event("on_init_end")

    def _begin_state(self) -> None:
        self.state = TrainerState(
            is_world_process_zero=self.state.is_world_process_zero,
            is_local_process_zero=self.state.is_local_process_zero,
            train_batch_size=self.args.per_device_train_batch_size,
        )
        self._apply_plan()
        self.control = TrainerControl()
        self._epoch = self._update = self._logged_step = 0
        self._loss_total = 0.0

    def _apply_plan(self) -> None:
        self.state.compute_steps(self._view, self.plan.max_steps)
        self.state.max_steps, self.state.num_train_epochs = self.plan.max_steps, self.plan.num_epochs

    def _event(self, name: str, **values: Any) -> None:
        call: Callable[..., TrainerControl] = getattr(self.handler, name)
        self.control = call(self._view, self.state, self.control, **values)

    def _settings(self) -> dict[str, Any]:
        shared = {name: getattr(self.args, name) for name in (*LAYOUT_FIELDS, *self.data_fields)}
        return {
            "trainer": type(self).__name__,
            "world_size": self.groups.world.size,
            **shared,
            "train_dataset": describe_rows(self.train_rows),
        }

    def _save_checkpoint(self) -> None:
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        loop = {
            "position": [self._epoch, self._update, self._logged_step],
            "window": self.window.state(),
            "leaf": self.loop_state(),
        }
        self.policy.wake()
        checkpointing.save_checkpoint(path, self.policy, self.state, loop, self._settings(), self.groups.world)
        checkpointing.rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, path, self.groups.world)

    def _resume(self, resume: str | bool | None) -> None:
        path = checkpointing.find_checkpoint(self.args.output_dir, resume)
        if path is None:
            if resume:
                self._say(f"no checkpoint in {self.args.output_dir} yet: training starts afresh")
            self.metrics_file.start_afresh()
            return
        checkpointing.check_checkpoint(path, self._settings())
        zero = self.state.is_world_process_zero, self.state.is_local_process_zero
        self.policy.wake()
        self.state, loop = checkpointing.load_checkpoint(path, self.policy, self.groups.world)
        self.state.is_world_process_zero, self.state.is_local_process_zero = zero
        self._apply_plan()
        self._epoch, self._update, self._logged_step = loop["position"]
        if self._update == self.plan.updates_per_epoch:
            self._epoch, self._update = self._epoch + 1, 0
        self.window.restore(loop["window"])
        self.restore_loop_state(loop["leaf"])
        self._say(f"resumed from {path}")

    def _say(self, text: str) -> None:
        if self.state.is_world_process_zero:
            print(f"megalign: {text}", flush=True)
