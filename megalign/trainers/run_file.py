"""run.json in output_dir: which run goes on there, and of which checkpoint the model there is.

`run` is a random name, made when a run starts afresh and kept when it is resumed; its checkpoints have it in their
manifests. `model` is there once the model has been written to its end, and until training begins again.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from megalign import durable
from megalign.checkpoints.checksums import MANIFEST, checksum
from megalign.errors import UserError

RUN_FILE = "run.json"


def new_run() -> str:
    """A name that no other run has; the training's generators stay where they are."""
    return secrets.token_hex(8)


def read_run(output_dir: str | Path) -> dict[str, Any]:
    """What the file says; {} where no run has begun."""
    file = Path(output_dir) / RUN_FILE
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "run" not in found:
        raise UserError(f"{file} is damaged; remove it, and latest means the newest whole checkpoint beside it")
    return found


def write_run(output_dir: str | Path, content: dict[str, Any]) -> None:
    """Durable, and all at once."""
    file = Path(output_dir) / RUN_FILE
    unfinished = file.with_suffix(".tmp")
    durable.write(unfinished, json.dumps(content).encode())
    durable.rename(unfinished, file)


def model_of(checkpoint: Path, step: int) -> dict[str, Any]:
    """What `model` is when the model has the checkpoint's weights: a manifest has the checksums of them all."""
    return {"step": step, "checkpoint": checksum(checkpoint / MANIFEST)}
