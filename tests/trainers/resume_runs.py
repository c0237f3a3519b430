"""What the tests of resumed runs share: a small run that saves, and why one does not go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.trainers.sft import SFTTrainer
from tests.trainers.runs import sft_fields, token_rows

ROWS = token_rows(14)


def saving_fields(directory: Path, **fields: Any) -> dict[str, Any]:
    """Of a run of six steps that saves."""
    # Every window of 2 steps straddles a checkpoint, and the run has a second epoch in another order.
    return {
        "output_dir": str(directory),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "shuffle_dataset": True,
        "gradient_accumulation_steps": 2,
        **fields,
    }


def resume_error(path: str, fields: dict[str, Any], rows: list[dict[str, Any]] = ROWS) -> str:
    """On a rank: why it does not go on."""
    try:
        SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=rows).train("latest")
    except UserError as error:
        return str(error)
    return "no error"
