"""TRL's API on Megatron-Core's parallelism. Attributes are imported only when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalign.config import GRPOConfig, SFTConfig
    from megalign.errors import UserError
    from megalign.trainers.grpo import GRPOTrainer
    from megalign.trainers.sft import SFTTrainer

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer", "UserError", "__version__"]

_HOMES = {
    "GRPOConfig": "megalign.config",
    "GRPOTrainer": "megalign.trainers.grpo",
    "SFTConfig": "megalign.config",
    "SFTTrainer": "megalign.trainers.sft",
    "UserError": "megalign.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megalign' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
