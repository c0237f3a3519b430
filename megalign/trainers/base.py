"""Trainer: the loop that all trainers share. Steps, epochs, logging, evaluation and saving are transformers'.

A leaf prepares rows, makes the updates of an epoch and names its loss. The epoch's `updates` is a generator
that yields after each optimizer step; what happens between two steps is here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput, speed_metrics

from megalign import failure, liveness
from megalign.batch import Batch, Counts
from megalign.callbacks import TrainerState
from megalign.checkpoints.find import ENGINE
from megalign.conversion.families import architecture_of
from megalign.conversion.flops import training_flops
from megalign.conversion.hf_files import read_config
from megalign.data.broken import Skipped
from megalign.data.chat import load_tokenizer, special_tokens_of
from megalign.errors import UserError
from megalign.model.layout_checks import check_policy
from megalign.parallel.groups import end_distributed, initialize
from megalign.parallel.reduce import CountFn, reduce_counts
from megalign.train_engine import StepResult, TrainEngine
from megalign.trainers import arguments
from megalign.trainers.accelerator import Accelerator
from megalign.trainers.keeping import Keeper
from megalign.trainers.reporting import MetricsWindow
from megalign.trainers.rows import EVALUATION, TRAIN, Rows
from megalign.trainers.run import Run
from megalign.trainers.schedule import LearningRate, plan_steps

# What of the rows a resumed run must share with the run that it goes on with; a leaf has more.
DATA_FIELDS = ("seed", "data_order_seed", "shuffle_dataset")
TIMEOUT_SLACK = 30  # seconds after ddp_timeout until a collective gives up by itself


class Trainer:
    """What all trainers share; not used by itself."""

    config_class: ClassVar[type]
    refused_arguments: ClassVar[Mapping[str, str]] = {}  # of TRL's constructor, with the reason
    data_fields: ClassVar[tuple[str, ...]] = DATA_FIELDS
    named_counts: ClassVar[Mapping[str, CountFn]] = {}  # global counts that the loss divides by, beside the usual

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
        failure.report_uncaught()
        arguments.refuse_arguments(type(self), self.refused_arguments, refused)
        self.model_path = arguments.model_directory(model, args)
        if args is None:
            kind = type(self).__name__.removesuffix("Trainer")  # TRL's name of the directory
            args = self.config_class(output_dir=f"{Path(self.model_path).name}-{kind}")
        if not isinstance(args, self.config_class):
            raise UserError(
                f"{type(self).__name__}(args=...) is a {type(args).__name__}; give a {self.config_class.__name__}"
            )
        self.args = args
        # The watch comes first, and has every rank's stack.
        self.groups = initialize(args, timeout_s=args.ddp_timeout + TIMEOUT_SLACK)
        args.validate(self.groups.world.size)
        arguments.check_evaluation(args, eval_dataset)
        callbacks = arguments.check_callbacks(callbacks)
        arguments.check_processing_class(processing_class)
        self.architecture = architecture_of(read_config(self.model_path))
        check_policy(self.architecture, args, self.groups)
        self.streams = isinstance(train_dataset, IterableDataset)
        self._given_processing_class = processing_class
        tokenizer = self.load_tokenizer() if processing_class is None else processing_class
        self.processing_class = self.adapted(tokenizer)
        self.make_parts()
        arguments.refuse_same_directory(args.output_dir, {"model": self.model_path})
        arguments.make_output_dir(args.output_dir)
        set_seed(args.seed)
        self.rows = Rows(args, self.groups, self.architecture)
        self.train_rows = self._prepared(train_dataset, TRAIN)
        self.eval_rows = self._prepared(eval_dataset, EVALUATION)
        self.policy = self.make_policy()
        self.run = Run(args, self.groups, callbacks, model=self.policy, processing_class=self.processing_class)
        self.keeper = Keeper(self)

    @property
    def state(self) -> TrainerState:
        """transformers' TrainerState, with the log_history."""
        return self.run.state

    @property
    def accelerator(self) -> Accelerator:
        """For scripts that print, wait or ask for their rank through it."""
        return Accelerator(self.groups.world)

    # ---- what a leaf says

    def load_tokenizer(self) -> Any:
        """The tokenizer when none was given; None where rows may do without."""
        return load_tokenizer(self.model_path) if arguments.has_tokenizer(self.model_path) else None

    def adapted(self, tokenizer: Any) -> Any:
        """The tokenizer, loaded or given, as the config wants it."""
        return tokenizer

    def changes_tokenizer(self) -> bool:
        """Whether `processing_class` is not what the model directory's files say."""
        return self._given_processing_class is not None

    def make_policy(self) -> TrainEngine:
        """The model that is trained."""
        return TrainEngine(self.model_path, self.args, self.groups)

    def engines(self) -> dict[str, TrainEngine]:
        """What a checkpoint keeps whole: every engine whose weights change, by the name of its directory."""
        return {ENGINE: self.policy}

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share beside layout, rows and architectures, in JSON's types."""
        return {}

    def make_parts(self) -> None:
        """What the trainer is made of beside rows and weights, and so the first to be known as wrong."""

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset:
        """The rows that the trainer works on, without those that `skipped` notes, if given; called once in the job."""
        raise NotImplementedError

    def with_row_columns(self, rows: Dataset) -> Dataset:
        """Tokenized rows with what is computed of them once; called on every rank."""
        return rows

    def max_steps(self) -> int:
        """Optimizer steps of the run; 0 or less leaves it to num_train_epochs."""
        return self.args.max_steps

    def rows_of(self, steps: int) -> int:
        """Rows that the first steps take of the dataset, as long as it has not come to its end."""
        raise NotImplementedError

    def rows_needed(self) -> int | None:
        """Rows that max_steps will take, where it is set: how much of a stream is read."""
        steps = self.max_steps()
        return self.rows_of(steps) if steps > 0 else None

    def described_rows(self) -> Dataset:
        """What a resumed run's rows are compared with: those of train_dataset, without what was computed of them."""
        return self.train_rows

    @property
    def rows_per_step(self) -> int:
        """Rows (of trainers that sample: completions) of an optimizer step, over all ranks."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.groups.dp.size

    def micro_steps_per_epoch(self) -> int:
        """Batches of `per_device_train_batch_size` rows a data-parallel rank takes in an epoch."""
        raise NotImplementedError

    def updates(self, epoch: int, first: int) -> Iterator[StepResult]:
        """Yields once for each optimizer step of the epoch, from its update number `first` on."""
        raise NotImplementedError

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of the engine's train_step."""
        raise NotImplementedError

    def evaluation(self, rows: Dataset) -> dict[str, float]:
        """Metrics of the evaluation rows, without the eval_ prefix."""
        raise NotImplementedError

    def loop_state(self) -> dict[str, Any]:
        """What a leaf must keep to go on, the same on every rank: tensors and plain values."""
        return {}

    def replica_state(self) -> Any:
        """The same of this data-parallel replica alone."""
        return None

    def restore_loop_state(self, state: Mapping[str, Any], replicas: Sequence[Any]) -> None:
        """Takes `loop_state` back, and the `replica_state` of every replica that there was."""

    def after_step(self) -> None:
        """Called on every rank after each optimizer step, before the callbacks hear of it."""

    def after_log(self) -> None:
        """Called on every rank after a training line is logged."""

    # ---- what a user calls

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains to max_steps or num_train_epochs; the model is left in Hugging Face form in output_dir."""
        if self.train_rows is None or len(self.train_rows) == 0:
            raise UserError("train_dataset has no rows to train on; pass train_dataset with at least one")
        self.plan = plan_steps(self.args, self.micro_steps_per_epoch(), self.max_steps())
        self.learning_rate = LearningRate(self.args, self.plan.max_steps)
        self.run.begin(self.plan)
        self.run.note(self.policy.made_of)
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        with self.run.stopping.listening(), liveness.limited(self.args.ddp_timeout, self.args.output_dir):
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        self.keeper.resume(resume_from_checkpoint)
        if self.rows.num_skipped:
            self.run.window.set(skipped_rows=self.rows.num_skipped)  # once, in the first line that is logged
        started, first_step = time.time(), self.state.global_step
        if first_step >= self.plan.max_steps:
            self.run.say(f"the run is finished: its checkpoint is of step {first_step} of {self.plan.max_steps}")
            if not self.keeper.has_model():
                self.run.say(f"{self.args.output_dir} does not have the model of that step: it is written now")
                if self.run.update:
                    self._end_epoch()
                self.keeper.end_checkpoint()
                self.keeper.write_model()
            self.eval_rows = self.rows.without_files(self.eval_rows)
            return TrainOutput(first_step, 0.0, {})
        self.run.event("on_train_begin")
        if self.args.eval_on_start and first_step == 0:  # else that was before the run's first step
            self.evaluate()
        while self.state.global_step < self.plan.max_steps and self.run.epoch < self.plan.num_epochs:
            self._run_epoch()
            if self.run.control.should_training_stop:
                break
        output = self._finish(started, first_step)
        if self.run.stopping.cause is not None:
            self.keeper.end_export()  # leaves the disk to the checkpoint
            self.keeper.end_checkpoint()
            self.run.tell_stop()
            return output
        self.keeper.end_checkpoint()
        self.keeper.write_model()
        self.keeper.end_export()
        self.eval_rows = self.rows.without_files(self.eval_rows)
        return output

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float | None]:
        """The metrics of the evaluation rows under eval_* names; logged like transformers' Trainer does."""
        rows = self.eval_rows if eval_dataset is None else self._prepared(eval_dataset, EVALUATION)
        if isinstance(rows, Mapping):
            parts = [self._evaluate(part, f"{metric_key_prefix}_{name}") for name, part in rows.items()]
            return {name: value for part in parts for name, value in part.items()}
        return self._evaluate(rows, metric_key_prefix)

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the model as a Hugging Face directory; called on every rank."""
        path = output_dir or self.args.output_dir
        self.policy.wake()
        self.policy.export(path, special_tokens=self.special_tokens)
        # The engine copies the model directory's own tokenizer files as they are.
        if self.changes_tokenizer() and self.state.is_world_process_zero:
            self.processing_class.save_pretrained(path)

    @property
    def model_directories(self) -> list[Path]:
        """Those into which `save_model` writes a model."""
        return [Path(self.args.output_dir)]

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokenizer's, which the exported model's config files repeat; transformers' Trainer aligns the same."""
        return special_tokens_of(self.processing_class)

    def end(self) -> None:
        """Leaves the job, as the last call of a script."""
        end_distributed()

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """One more callback, as transformers' Trainer.add_callback."""
        self.run.handler.add_callback(callback)

    # ---- one optimizer step, called by the leaf

    def update(self, batches: list[Batch], counts: Counts | None = None) -> StepResult:
        """An optimizer step on this rank's microbatches, at the step's learning rate; its metrics are noted."""
        # Megatron's step is one with its backward pass, so this event comes before both.
        self.run.event("on_pre_optimizer_step")
        rate = self.learning_rate(self.state.global_step)
        counts = counts or self.counts(batches)
        with self.run.phases("update"):
            result = self.policy.train_step(batches, self.loss, learning_rate=rate, counts=counts)
        self.run.count_flops(self._flops(batches))
        self.run.event("on_optimizer_step")
        self.run.count_result(result, rate)
        return result

    def counts(self, batches: list[Batch]) -> Counts:
        """The global counts of a step; `batches` are this rank's."""
        return reduce_counts(batches, self.groups, self.named_counts)

    def _flops(self, batches: list[Batch]) -> float:
        """Of the policy's update, for each rank of this replica."""
        lengths = [length for batch in batches for length in batch.lengths.tolist()]
        predicted = sum(int(batch["loss_mask"].sum()) for batch in batches)
        ranks = self.groups.world.size // self.groups.dp.size
        return training_flops(self.architecture, lengths, predicted) / ranks

    # ---- between two steps

    def _run_epoch(self) -> None:
        self.run.event("on_epoch_begin")
        updates = self.updates(self.run.epoch, self.run.update)
        for _ in range(self.run.update, self.plan.updates_per_epoch):
            self.run.phases.begin_step()
            self.run.event("on_step_begin")
            next(updates)
            self.run.note_time()
            self.run.count_step(self.plan)
            self.after_step()
            self.keeper.export_if_due()
            self.run.event("on_step_end")
            self._act(listening=True)
            self._end_if_skipping()
            if self.run.control.should_epoch_stop or self.run.control.should_training_stop:
                break
        updates.close()
        if self.run.stopping.cause is None:  # otherwise whoever resumes ends the epoch, if it is over
            self._end_epoch()

    def _end_epoch(self) -> None:
        # An epoch that max_steps or a callback cuts short is not over: a longer run goes on in the middle of it.
        if self.run.update >= self.plan.updates_per_epoch or self.run.control.should_epoch_stop:
            self.run.count_epoch()
        self.run.event("on_epoch_end")
        self._act()

    def _end_if_skipping(self) -> None:
        if not self.run.skips.too_many:
            return
        if self.run.stopping.cause is None:  # else the state is saved already
            self.keeper.save()
        self.keeper.end_checkpoint()
        self.keeper.end_export()
        raise self.run.skips.error(f"checkpoint-{self.state.global_step}")

    def _act(self, *, listening: bool = False) -> None:
        """Logs, evaluates and saves as the callbacks decided, or as a stop needs it."""
        self.keeper.progress()
        # Each of the three fires events, in which the callbacks of one rank may decide anew: all ranks must know
        # before they enter the next collective work, and before the loop asks whether to go on.
        self.run.agree(listening=listening)
        if self.run.log_training():
            self.after_log()
        self.run.agree()
        # An evaluation may outlast the patience of whoever asked for a stop.
        if self.run.control.should_evaluate and self.run.stopping.cause is None:
            self.evaluate()
        self.run.agree()
        self._save_if_due()
        self.run.agree()

    def _save_if_due(self) -> None:
        if self.run.control.should_save:
            self.keeper.save()
            self.run.event("on_save")

    def _evaluate(self, rows: Dataset | None, prefix: str) -> dict[str, float | None]:
        if rows is None or len(rows) == 0:
            raise UserError("evaluate() has no rows; pass eval_dataset to it or to the trainer")
        started = time.time()
        window = MetricsWindow()
        window.add(self.evaluation(rows))
        window.set(num_tokens=self.state.num_input_tokens_seen)  # trained on so far, as in TRL
        metrics = {f"{prefix}_{name}": value for name, value in window.drain().items()}
        metrics.update(speed_metrics(prefix, started, num_samples=len(rows)))
        self.run.log_evaluation(metrics)
        return metrics

    def _finish(self, started: float, first_step: int) -> TrainOutput:
        steps = self.state.global_step - first_step
        metrics = speed_metrics("train", started, num_samples=steps * self.rows_per_step, num_steps=steps)
        metrics["train_loss"] = self.run.loss_total / max(self.run.num_losses, 1)
        self.run.log_summary(metrics)
        self.run.event("on_train_end")
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    # ---- rows

    def _prepared(self, dataset: Any, name: str) -> Any:
        if dataset is None:
            return None
        if name == EVALUATION and isinstance(dataset, Mapping):
            return {part: self._prepared(rows, name) for part, rows in dataset.items()}
        return self.with_row_columns(self.rows.prepared(dataset, name, self.tokenized, self.rows_needed))
