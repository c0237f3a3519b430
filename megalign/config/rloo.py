"""RLOOConfig: REINFORCE with a leave-one-out baseline, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.group import GroupConfig
from megalign.config.refused import RLOO, Refusal
from megalign.config.values import option
from megalign.errors import UserError


@config
class RLOOConfig(GroupConfig):
    """RLOO (arXiv 2402.14740): each completion against the others of its group."""

    refused: ClassVar[Mapping[str, Refusal]] = RLOO

    learning_rate: float = option(1e-6, minimum=0)
    """AdamW's peak learning rate."""
    num_generations: int = option(2, minimum=2)
    """Completions per prompt: each is compared with the mean of the others."""
    beta: float = option(0.05, minimum=0)
    """Weight of the KL divergence from the reference model, which is taken off the reward; 0 loads none."""
    normalize_advantages: bool = False
    """Bring the advantages of a round to mean 0 and standard deviation 1."""
    reward_clip_range: list[float] | None = None
    """Least and largest reward; the KL divergence is taken off afterwards."""

    def validate(self, world_size: int) -> None:
        """A range of rewards has two ends."""
        super().validate(world_size)
        ends = self.reward_clip_range
        if ends is not None and (len(ends) != 2 or ends[0] >= ends[1]):
            raise UserError(f"reward_clip_range={ends} must be two numbers, the lower first; give e.g. [-1, 1]")
