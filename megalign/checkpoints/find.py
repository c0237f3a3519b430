"""From the path that a user gives to the directory that holds tensors, and to the config.json that belongs to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalign.checkpoints.reader import CONFIG_FILE
from megalign.errors import UserError
from megalign.unpickle import METADATA_FILE

HUGGING_FACE = "hugging_face"
"""In a checkpoint: config.json, generation config and tokenizer of the model."""
_ENGINE = "engine"  # the policy's in a trainer's checkpoint-N
_MANIFEST = "manifest.json"
_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's


def engine_directory(path: Path) -> Path:
    """The torch_dist directory that a path means: itself, a trainer's checkpoint-N, or Megatron-LM's save directory."""
    if not path.is_dir():
        raise UserError(f"checkpoint directory {str(path)!r} does not exist; give a torch_dist directory")
    if (path / METADATA_FILE).exists():
        return _whole(path)
    if (path / _ENGINE / METADATA_FILE).exists():
        if not (path / _MANIFEST).exists():
            raise UserError(f"{path} has no {_MANIFEST}, so it was not written to its end; use another checkpoint")
        return _whole(path / _ENGINE)
    if (path / _TRACKER).exists():
        iteration = (path / _TRACKER).read_text().strip()
        inner = path / (f"iter_{int(iteration):07d}" if iteration.isdigit() else "release")
        if (inner / METADATA_FILE).exists():
            return _whole(inner)
    raise UserError(
        f"{path} holds no torch_dist checkpoint: neither {METADATA_FILE} nor {_ENGINE}/{METADATA_FILE} nor "
        f"Megatron-LM's {_TRACKER}; give the directory with {METADATA_FILE} in it"
    )


def reference_of(directory: Path, given: Path | None) -> Path:
    """The Hugging Face directory that says what the model is."""
    own = directory / HUGGING_FACE
    if given is not None:
        return given
    if not own.is_dir():
        raise UserError(
            f"{directory} has no {HUGGING_FACE}/ (megalign writes it, other programs do not), so its config.json and "
            "tokenizer are not known; give --hf-reference DIR"
        )
    return own


def manifest_of(directory: Path) -> dict[str, Any]:
    """What a trainer noted of the checkpoint that the engine's directory is in; {} elsewhere."""
    file = directory.parent / _MANIFEST
    return json.loads(file.read_text()) if file.exists() else {}


def _whole(directory: Path) -> Path:
    config = directory / CONFIG_FILE
    if not config.exists():
        raise UserError(f"{directory} has no {CONFIG_FILE}, so it was not written to its end; use another checkpoint")
    backend = json.loads(config.read_text()).get("sharded_backend")
    if backend != "torch_dist":
        raise UserError(f"{directory} is in the format {backend!r}, and only 'torch_dist' is read; save it as that")
    return directory
