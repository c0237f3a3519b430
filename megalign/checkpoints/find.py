"""From the path that a user gives to the directory that holds tensors, and to the config.json that belongs to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megalign.checkpoints.checksums import MANIFEST, read_manifest
from megalign.checkpoints.reader import CONFIG_FILE
from megalign.conversion.hf_files import read_json
from megalign.errors import UserError
from megalign.unpickle import METADATA_FILE

HUGGING_FACE = "hugging_face"
"""In a checkpoint: config.json, generation config and tokenizer of the model."""
ENGINE = "engine"
"""The policy's directory in a trainer's checkpoint-N."""
_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's


def engine_directory(path: Path) -> Path:
    """The torch_dist directory that a path means: itself, a trainer's checkpoint-N, or Megatron-LM's save directory."""
    if not path.is_dir():
        raise UserError(f"checkpoint directory {str(path)!r} does not exist; give a torch_dist directory")
    if (path / METADATA_FILE).exists():
        return _whole(path)
    if (path / ENGINE / METADATA_FILE).exists():
        if not (path / MANIFEST).exists():
            raise UserError(f"{path} has no {MANIFEST}, so it was not written to its end; use another checkpoint")
        return _whole(path / ENGINE)
    if (path / _TRACKER).exists():
        iteration = (path / _TRACKER).read_text(errors="replace").strip()
        # Ten digits at most: what else it holds may be of any length.
        inner = path / (f"iter_{int(iteration):07d}" if re.fullmatch("[0-9]{1,10}", iteration) else "release")
        if (inner / METADATA_FILE).exists():
            return _whole(inner)
    raise UserError(
        f"{path} holds no torch_dist checkpoint: neither {METADATA_FILE} nor {ENGINE}/{METADATA_FILE} nor "
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
    file, found = directory.parent / MANIFEST, read_manifest(directory.parent)
    if found is None and file.exists():
        raise UserError(f"{file} is damaged, or no trainer's; use another checkpoint, or move {directory} elsewhere")
    return found or {}


def noted_files(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The directory's files with what the trainer noted of each; none where no trainer did."""
    files = manifest_of(directory).get("files", {}).items()
    return [(directory.parent / name, then) for name, then in files if name.startswith(f"{directory.name}/")]


def _whole(directory: Path) -> Path:
    config = directory / CONFIG_FILE
    if not config.exists():
        raise UserError(f"{directory} has no {CONFIG_FILE}, so it was not written to its end; use another checkpoint")
    backend = read_json(config).get("sharded_backend")
    if backend != "torch_dist":
        raise UserError(f"{directory} is in the format {backend!r}, and only 'torch_dist' is read; save it as that")
    return directory
