"""ORPOConfig: preference optimization without a reference, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.offline import OfflineConfig
from megalign.config.refused import ORPO, Refusal
from megalign.config.values import option


@config
class ORPOConfig(OfflineConfig):
    """ORPO (arXiv 2403.07691) on pairs of a chosen and a rejected answer."""

    refused: ClassVar[Mapping[str, Refusal]] = ORPO

    learning_rate: float = option(1e-6, minimum=0)
    """AdamW's peak learning rate."""
    max_completion_length: int | None = option(None, minimum=1)
    """Longest completion, in tokens, which max_length may shorten further (None: only that). TRL's reads it for
    encoder-decoder models alone."""
    beta: float = option(0.1, minimum=0)
    """Weight of the odds ratio beside the likelihood of the chosen answer (the paper's lambda)."""
