"""RewardConfig: a model of which of two answers people prefer, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.offline import OfflineConfig
from megalign.config.refused import REWARD, Refusal
from megalign.config.values import option


@config
class RewardConfig(OfflineConfig):
    """A reward model (Bradley-Terry) on pairs of a chosen and a rejected answer."""

    refused: ClassVar[Mapping[str, Refusal]] = REWARD

    learning_rate: float = option(1e-4, minimum=0)
    """AdamW's peak learning rate."""
    max_length: int | None = option(1024, minimum=2)
    """Longest answer with its prompt, in tokens; pairs with a longer one are dropped (None: never)."""
    center_rewards_coefficient: float | None = option(None, minimum=0)
    """Weight of the squared sum of a pair's rewards, which keeps them around 0 (arXiv 2312.09244); 0.01 is
    usual."""
