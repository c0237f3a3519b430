"""Every option of every command, as flat keyword-only dataclasses; imports neither torch nor transformers."""

from megalign.config.grpo import GRPOConfig
from megalign.config.loop import LoopConfig
from megalign.config.parallel import ParallelConfig
from megalign.config.rollout import RolloutConfig
from megalign.config.sft import SFTConfig

__all__ = ["GRPOConfig", "LoopConfig", "ParallelConfig", "RolloutConfig", "SFTConfig"]
