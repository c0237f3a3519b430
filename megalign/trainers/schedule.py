"""When things happen: how many optimizer steps an epoch and a run have, and the learning rate of each step.

Both follow transformers' Trainer to the number; the schedules are its own functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from megalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The steps of a run. A micro step is a `per_device_train_batch_size` batch on each data-parallel rank."""

    micro_steps_per_epoch: int
    accumulation: int
    max_steps: int

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last may have fewer micro steps."""
        return max(1, math.ceil(self.micro_steps_per_epoch / self.accumulation))

    @property
    def num_epochs(self) -> int:
        """Epochs begun until `max_steps` is reached."""
        return math.ceil(self.max_steps / self.updates_per_epoch)

    def epoch_fraction(self, updates: int) -> float:
        """How much of an epoch lies behind after its first `updates` optimizer steps."""
        return min(updates * self.accumulation, self.micro_steps_per_epoch) / self.micro_steps_per_epoch


def plan_steps(args: Any, micro_steps_per_epoch: int, max_steps: int) -> StepPlan:
    """`max_steps` when it is above 0, otherwise as many steps as `num_train_epochs` has."""
    updates = max(1, math.ceil(micro_steps_per_epoch / args.gradient_accumulation_steps))
    max_steps = max_steps if max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    if max_steps <= 0:
        raise UserError(
            f"max_steps={args.max_steps}, num_train_epochs={args.num_train_epochs} leave nothing to train; "
            "set one of them above 0"
        )
    return StepPlan(
        micro_steps_per_epoch=micro_steps_per_epoch,
        accumulation=args.gradient_accumulation_steps,
        max_steps=max_steps,
    )


class LearningRate:
    """The learning rate of every step, from transformers' own schedule function."""

    def __init__(self, args: Any, max_steps: int) -> None:
        self.base = args.learning_rate
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.base)
        try:
            scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=warmup_steps(args, max_steps),
                num_training_steps=max_steps,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
        except (TypeError, ValueError) as error:
            raise UserError(
                f"lr_scheduler_type={args.lr_scheduler_type!r} does not take lr_scheduler_kwargs="
                f"{args.lr_scheduler_kwargs}: {error}"
            ) from error
        if not isinstance(scheduler, LambdaLR):
            raise UserError(
                f"lr_scheduler_type={args.lr_scheduler_type!r} follows a metric instead of the step; "
                "take one that follows the step, such as cosine or linear"
            )
        self.factor = scheduler.lr_lambdas[0]  # of the peak, by the number of finished steps

    def __call__(self, step: int) -> float:
        """The rate of the optimizer step that follows `step` finished ones."""
        return self.base * self.factor(step)


def warmup_steps(args: Any, max_steps: int) -> int:
    """`warmup_steps` from 1 on is a number of steps, below 1 a fraction of the run."""
    return int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(max_steps * args.warmup_steps)
