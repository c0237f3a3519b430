"""Run: where a training run stands, and who is told of it. State, callbacks, the logging window, metrics.jsonl."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megalign import device
from megalign.callbacks import CallbackArguments, TrainerControl, TrainerState, make_handler
from megalign.parallel.control import any_rank
from megalign.parallel.groups import ParallelGroups
from megalign.train_engine import StepResult
from megalign.trainers.phases import Phases
from megalign.trainers.reporting import MetricsFile, MetricsWindow
from megalign.trainers.schedule import StepPlan
from megalign.trainers.skipping import Skips
from megalign.trainers.stopping import CAUSES, Stopping

_DECISIONS = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")
_FIRST_IN_LINE = ("loss", "grad_norm", "learning_rate")


class Run:
    """The state of one run on this rank; equal on all ranks but for who prints and writes."""

    def __init__(
        self, args: Any, groups: ParallelGroups, callbacks: Sequence[Any] | None, *, model: Any, processing_class: Any
    ) -> None:
        self.world, self._max_skipped_steps = groups.world, args.max_skipped_steps
        self._peak_flops = device.peak_flops() if args.params_dtype_name == "bfloat16" else None
        # A launcher that sets no LOCAL_RANK leaves it open who shares this node: then the job's first is the one.
        local_rank = int(os.environ.get("LOCAL_RANK", self.world.rank))
        self._process_flags = {
            "is_world_process_zero": self.world.rank == 0,
            "is_local_process_zero": local_rank == 0,
        }
        self.arguments = CallbackArguments(
            args, process_index=self.world.rank, local_process_index=local_rank, world_size=self.world.size
        )
        self.handler = make_handler(
            args,
            callbacks,
            is_world_zero=self.world.rank == 0,
            model=model,
            processing_class=processing_class,
        )
        self.window = MetricsWindow()
        self.phases = Phases()
        self.file = MetricsFile(args.output_dir, active=self.world.rank == 0)
        self.state = TrainerState(**self._process_flags)
        self.control = TrainerControl()
        self.stopping = Stopping(args.output_dir, is_first=self.world.rank == 0)
        self.event("on_init_end")

    def begin(self, plan: StepPlan) -> None:
        """A run from its first step."""
        self.state = TrainerState(train_batch_size=self.arguments.train_batch_size, **self._process_flags)
        self.control = TrainerControl()
        self.window = MetricsWindow()
        self.phases = Phases()
        self.epoch = self.update = 0  # epochs that are over, and steps of the one that is not
        self.logged_step = self.logged_tokens = 0
        self._flops, self._pipeline_wait_s = 0.0, None
        self.loss_total, self.num_losses = 0.0, 0
        self.skips = Skips(self._max_skipped_steps, self.note)
        self._apply(plan)

    def resume(self, state: TrainerState, position: dict[str, Any], plan: StepPlan) -> None:
        """A run from where `position` was taken."""
        self.state = state
        vars(self.state).update(self._process_flags)
        self.epoch, self.update, self.logged_step = position["epoch"], position["update"], position["logged_step"]
        self.logged_tokens = position["logged_tokens"]
        self.window.restore(position["window"])
        self.phases.restore(position["phases"])
        self.skips.total = position["skipped"]
        self._apply(plan)

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the TrainerState."""
        return {
            "epoch": self.epoch,
            "update": self.update,
            "logged_step": self.logged_step,
            "logged_tokens": self.logged_tokens,
            "window": self.window.state(),
            "phases": self.phases.names,
            "skipped": self.skips.total,
        }

    def _apply(self, plan: StepPlan) -> None:
        self.state.compute_steps(self.arguments, plan.max_steps)
        self.state.max_steps, self.state.num_train_epochs = plan.max_steps, plan.num_epochs

    def event(self, name: str, **values: Any) -> None:
        """Tells every callback."""
        call: Callable[..., TrainerControl] = getattr(self.handler, name)
        self.control = call(self.arguments, self.state, self.control, **values)

    def agree(self, *, listening: bool = False) -> None:
        """What one rank's callbacks decided, all ranks do; `listening`, what it was asked to as well."""
        asked = self.stopping.asked() if listening else [False] * len(CAUSES)
        wishes = [*(getattr(self.control, name) for name in _DECISIONS), *asked]
        decided = any_rank(wishes, self.world)
        for name, value in zip(_DECISIONS, decided[: len(_DECISIONS)], strict=True):
            setattr(self.control, name, value)
        if self.stopping.heed(decided[len(_DECISIONS) :]):
            self.control.should_save = self.control.should_training_stop = True

    def count_step(self, plan: StepPlan) -> None:
        """One optimizer step more."""
        self.update += 1
        self.state.global_step += 1
        self.state.epoch = self.epoch + plan.epoch_fraction(self.update)

    def count_epoch(self) -> None:
        """The epoch is over, whether all of its steps were taken or a callback ended it."""
        self.epoch, self.update = self.epoch + 1, 0

    def count_result(self, result: StepResult, learning_rate: float) -> None:
        """What an optimizer step did, into the window; one that was skipped is told of at once."""
        self.skips.count(result, self.state.global_step + 1)
        self.count_loss(result.loss)
        self.window.add(result.metrics)
        self.window.set(grad_norm=result.grad_norm, learning_rate=learning_rate)
        self._pipeline_wait_s = result.pipeline_wait_s

    def count_loss(self, loss: float) -> None:
        """A step's loss, and how many steps were skipped until then."""
        self.window.add({"loss": loss})
        if self.skips.total:
            self.window.set(skipped_steps=self.skips.total)
        # A line shows a loss that was not finite; the mean of the whole run is of the others.
        if math.isfinite(loss):
            self.loss_total, self.num_losses = self.loss_total + loss, self.num_losses + 1

    def count_flops(self, flops: float) -> None:
        """Of the step's update, for this rank."""
        self._flops += flops

    def note_time(self) -> None:
        """Where the step's time went, and how fast the update was, into the window."""
        spent = self.phases.end_step()
        if self._pipeline_wait_s is not None:
            spent["perf/pipeline_wait_s"] = self._pipeline_wait_s
        self.window.add_parts(spent, whole="step_time")
        if self._flops:
            rate = self._flops / spent["perf/update_s"]
            self.window.add({"perf/tflops": rate / 1e12})
            if self._peak_flops is not None:
                self.window.add({"perf/mfu": rate / self._peak_flops})
        self._flops, self._pipeline_wait_s = 0.0, None

    def count_tokens(self, count: int) -> None:
        """Tokens of the whole job, prompts included, into `num_tokens`."""
        self.state.num_input_tokens_seen += count
        self.window.set(num_tokens=self.state.num_input_tokens_seen)

    def log_training(self) -> bool:
        """The window as a line, if the callbacks want one and there was a step since the last; whether it was."""
        if not self.control.should_log or self.state.global_step <= self.logged_step:
            return False
        line = self._drained()
        self.log(line)
        self._write(line)
        return True

    def log_summary(self, metrics: dict[str, float]) -> None:
        """train_* names, for the history and the callbacks; steps since the last line go to metrics.jsonl alone.

        transformers tells the callbacks nothing of these.
        """
        if self.state.global_step > self.logged_step:
            self._write(self._drained())
        self.log(metrics)

    def _drained(self) -> dict[str, Any]:
        seconds, tokens = sum(self.window.means["step_time"]), self.state.num_input_tokens_seen - self.logged_tokens
        self.window.set(**{"perf/tokens_per_s": tokens / seconds})
        line = self.window.drain()
        self.logged_step, self.logged_tokens = self.state.global_step, self.state.num_input_tokens_seen
        return {name: line[name] for name in _FIRST_IN_LINE} | line

    def _write(self, line: Mapping[str, Any]) -> None:
        self.file.append({"step": self.state.global_step, "epoch": self.state.epoch, **line})

    def log_evaluation(self, metrics: dict[str, float | None]) -> None:
        """A line of eval_* names only."""
        self.log(metrics)
        self.file.append({"step": self.state.global_step, **metrics})
        self.event("on_evaluate", metrics=metrics)

    def log(self, line: dict[str, Any]) -> None:
        """Into the history and to the callbacks, which get no None: TensorBoard would warn of each."""
        line = {**line, "epoch": self.state.epoch}
        self.state.log_history.append({**line, "step": self.state.global_step})
        self.event("on_log", logs={name: value for name, value in line.items() if value is not None})

    def say(self, text: str) -> None:
        """One line on the terminal, from the first rank."""
        if self.state.is_world_process_zero:
            print(f"megalign: {text}", flush=True)

    def tell_stop(self) -> None:
        """That the run ended because it was asked to, for people and in metrics.jsonl."""
        step, cause = self.state.global_step, self.stopping.cause
        self.file.append({"step": step, "epoch": self.state.epoch, "stopped": cause})
        self.say(
            f"stopped after step {step}, as {cause} asked: checkpoint-{step} is written, the final model is not; "
            "resume_from_checkpoint latest goes on"
        )

    def note(self, text: str) -> None:
        """The same beside the output: what a user may want to know and no program reads."""
        if self.state.is_world_process_zero:
            print(f"megalign: {text}", file=sys.stderr, flush=True)
