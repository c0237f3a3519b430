"""A reference model that follows the policy: TRL's fields, shared by DPO, KTO, GRPO and RLOO."""

from __future__ import annotations

from megalign.config.base import Config, config
from megalign.config.values import option


@config
class ReferenceConfig(Config):
    """The reference model: fixed, or following the policy (TR-DPO, arXiv 2404.09656)."""

    sync_ref_model: bool = False
    """Move the reference towards the policy every ref_model_sync_steps steps."""
    ref_model_mixup_alpha: float = option(0.6, minimum=0, maximum=1)
    """The policy's share in the moved reference; the rest is the reference as it was."""
    ref_model_sync_steps: int = option(512, minimum=1)
    """Optimizer steps between two moves of the reference."""
