"""Every option of every command, as flat keyword-only dataclasses; imports neither torch nor transformers."""

from megalign.config.dpo import DPOConfig
from megalign.config.grpo import GRPOConfig
from megalign.config.kto import KTOConfig
from megalign.config.loop import LoopConfig
from megalign.config.orpo import ORPOConfig
from megalign.config.parallel import ParallelConfig
from megalign.config.ppo import PPOConfig
from megalign.config.reward import RewardConfig
from megalign.config.rloo import RLOOConfig
from megalign.config.rollout import RolloutConfig
from megalign.config.sft import SFTConfig

__all__ = [
    "DPOConfig",
    "GRPOConfig",
    "KTOConfig",
    "LoopConfig",
    "ORPOConfig",
    "PPOConfig",
    "ParallelConfig",
    "RLOOConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
]
