"""KTOConfig: preference optimization on single answers, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.preference import PreferenceConfig
from megalign.config.refused import KTO, Refusal
from megalign.config.values import option
from megalign.errors import UserError


@config
class KTOConfig(PreferenceConfig):
    """KTO (arXiv 2402.01306) on single answers that are good or bad."""

    refused: ClassVar[Mapping[str, Refusal]] = KTO

    learning_rate: float = option(1e-6, minimum=0)
    """AdamW's peak learning rate."""
    shuffle_dataset: bool = True
    """Rows in a random order, with loss_type kto drawn once for the run: each epoch then draws the order of the
    steps, whose rows keep their mismatched answers. False takes rows in order, one global batch after another. (TRL's
    train_sampling_strategy="sequential" takes them in order, which for rows made of pairs is good answers
    first and then bad ones, a thousand pairs at a time.)"""
    loss_type: str = option("kto", choices=("kto", "apo_zero_unpaired"))
    """kto, or apo_zero_unpaired (arXiv 2408.06266), which needs no estimate of the KL divergence."""
    beta: float = option(0.1, above=0)
    """How firmly the policy is held to the reference."""
    desirable_weight: float = option(1.0, minimum=0)
    """Weight of good answers; with unequal numbers of good and bad ones, raise the rarer side's."""
    undesirable_weight: float = option(1.0, minimum=0)
    """Weight of bad answers."""

    def validate(self, world_size: int) -> None:
        """The KL divergence is estimated on answers to other rows of the step."""
        super().validate(world_size)
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.data_parallel_size(world_size)
        if self.loss_type == "kto" and rows < 2:
            raise UserError(
                "loss_type='kto' estimates the KL divergence on answers to other rows of the same step, which has "
                "1 row; raise per_device_train_batch_size or gradient_accumulation_steps, or use apo_zero_unpaired"
            )
