"""TRL's API on Megatron-Core's parallelism. Attributes are imported only when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalign.config import (
        DPOConfig,
        GRPOConfig,
        KTOConfig,
        ORPOConfig,
        PPOConfig,
        RewardConfig,
        RLOOConfig,
        SFTConfig,
    )
    from megalign.errors import UserError
    from megalign.scripts import (
        DatasetConfig,
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        TrlParser,
        get_dataset,
        get_kbit_device_map,
        get_peft_config,
        get_quantization_config,
    )
    from megalign.trainers.dpo import DPOTrainer
    from megalign.trainers.grpo import GRPOTrainer
    from megalign.trainers.kto import KTOTrainer
    from megalign.trainers.orpo import ORPOTrainer
    from megalign.trainers.ppo import PPOTrainer
    from megalign.trainers.reward import RewardTrainer
    from megalign.trainers.rloo import RLOOTrainer
    from megalign.trainers.sft import SFTTrainer

__version__ = "0.1.0"
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DatasetConfig",
    "DatasetMixtureConfig",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
    "ORPOConfig",
    "ORPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "ScriptArguments",
    "TrlParser",
    "UserError",
    "__version__",
    "get_dataset",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
]

_ALGORITHMS = ("SFT", "Reward", "DPO", "KTO", "ORPO", "PPO", "GRPO", "RLOO")
_SCRIPTS = (
    "DatasetConfig",
    "DatasetMixtureConfig",
    "ModelConfig",
    "ScriptArguments",
    "TrlParser",
    "get_dataset",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
)
_HOMES = {
    "UserError": "megalign.errors",
    **dict.fromkeys(_SCRIPTS, "megalign.scripts"),
    **{f"{name}Config": "megalign.config" for name in _ALGORITHMS},
    **{f"{name}Trainer": f"megalign.trainers.{name.lower()}" for name in _ALGORITHMS},
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megalign' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
