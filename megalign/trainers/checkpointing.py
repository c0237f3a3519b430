"""checkpoint-{step}/: the engines' training checkpoints and what the loop needs to go on bitwise.

`manifest.json` is written last: a directory without one is not whole and is never resumed from.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_callback import TrainerState

from megalign.checkpoints.find import HUGGING_FACE
from megalign.errors import UserError
from megalign.parallel.control import barrier
from megalign.parallel.groups import Axis
from megalign.unpickle import load_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megalign.train_engine import TrainEngine

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
LATEST = "latest"
_MANIFEST_KINDS = {"step": int, "written": float, "settings": dict, "files": dict}
# CheckpointException is torch's, of a file that any rank could not read; it is no Exception.
_DAMAGED = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, json.JSONDecodeError)
_DAMAGED_ENGINE = (*_DAMAGED, CheckpointException, CheckpointingException)


def save_checkpoint(
    path: Path,
    engines: Mapping[str, TrainEngine],
    state: TrainerState,
    loop: Mapping[str, Any],
    settings: Mapping[str, Any],
    world: Axis,
    *,
    special_tokens: Mapping[str, int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes a whole checkpoint; `loop` is this rank's part, `settings` what a resumed run must share.

    The models' config files get the tokenizer's `special_tokens`, and `tokenizer` where it is not their directories'.
    """
    if world.rank == 0 and path.exists():  # left by a run that was killed, or by one that is being repeated
        with _writing(path):
            shutil.rmtree(path)
    barrier(world)
    with _writing(path):
        (path / "loop").mkdir(parents=True, exist_ok=True)
    for name, engine in engines.items():
        with engine.kept_as_it_was(), _writing(path):
            engine.save(str(path / name), special_tokens=special_tokens)
            if tokenizer is not None and world.rank == 0:
                tokenizer.save_pretrained(path / name / HUGGING_FACE)
    with _writing(path):
        torch.save({"rng": rng_state(), **loop}, _loop_file(path, world.rank))
        if world.rank == 0:
            state.save_to_json(str(path / STATE))
    barrier(world)
    if world.rank == 0:
        files = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
        manifest = {"step": state.global_step, "written": time.time(), "settings": dict(settings), "files": files}
        unfinished = path / f"{MANIFEST}.tmp"
        unfinished.write_text(json.dumps(manifest, indent=1))
        unfinished.rename(path / MANIFEST)  # atomic: half a manifest never counts as one
    barrier(world)


def load_checkpoint(path: Path, engines: Mapping[str, TrainEngine], world: Axis) -> tuple[TrainerState, dict[str, Any]]:
    """Puts the engines and this rank's random generators where the checkpoint left them."""
    for name, engine in engines.items():
        with engine.kept_as_it_was(), _reading(path / name, *_DAMAGED_ENGINE):
            engine.load(str(path / name))
    file = _loop_file(path, world.rank)
    with _reading(file, *_DAMAGED), file.open("rb") as stream:
        loop = load_data(stream, str(file), map_location="cpu")
    set_rng_state(loop.pop("rng"))
    with _reading(path / STATE, ValueError, TypeError):  # no JSON, or other fields
        return TrainerState.load_from_json(str(path / STATE)), loop


def find_checkpoint(output_dir: str, resume: str | bool | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or the newest whole one for "latest" or True."""
    if resume is None or resume is False or resume == "":
        return None
    if resume is True or resume == LATEST:
        whole = [path for path in checkpoints(output_dir) if _manifest(path) is not None]
        return whole[-1] if whole else None
    path = Path(str(resume))
    if not path.is_dir():
        raise UserError(
            f"resume_from_checkpoint={resume} is not a directory; give a checkpoint-N directory or {LATEST}"
        )
    if not (path / MANIFEST).exists():
        raise UserError(
            f"{path} has no {MANIFEST}, so it was not written to its end; resume from another checkpoint or {LATEST}"
        )
    if _manifest(path) is None:
        raise UserError(f"{path / MANIFEST} is damaged; resume from another checkpoint or {LATEST}")
    return path


def check_checkpoint(path: Path, settings: Mapping[str, Any]) -> int:
    """The step of a checkpoint whose files are whole and whose layout, models and data are this run's."""
    manifest = _manifest(path)
    assert manifest is not None, "find_checkpoint gives no other"
    for name, size in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.exists() else "no"
        if found != size:
            raise UserError(f"{file} has {found} bytes where its manifest says {size}; resume from another checkpoint")
    for name, value, then in _differences(json.loads(json.dumps(dict(settings))), manifest["settings"]):
        raise UserError(
            f"{name} is {value} but {path} was made with {then}; resuming needs the same layout, models and data: "
            f"set {name} back, or start without resume_from_checkpoint"
        )
    return int(manifest["step"])


def rotate_checkpoints(output_dir: str, limit: int | None, newest: Path, world: Axis) -> None:
    """Deletes the oldest checkpoints beyond `save_total_limit`, never the one just written."""
    if not limit or world.rank != 0:
        return
    others = [path for path in checkpoints(output_dir) if path.name != newest.name]
    for path in others[: max(0, len(others) + 1 - limit)]:
        (path / MANIFEST).unlink(missing_ok=True)  # first, so that a killed deletion leaves nothing that looks whole
        shutil.rmtree(path)


def checkpoints(output_dir: str) -> list[Path]:
    """All checkpoint-N directories in the order in which they were written; those that are not whole come first.

    Not by step: an earlier, longer run in the same directory would be taken for the newest, and this run's own
    checkpoints be rotated away.
    """
    found = [
        (_written(path), int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for *_, path in sorted(found)]


def _written(path: Path) -> float:
    manifest = _manifest(path)
    return 0.0 if manifest is None else float(manifest["written"])


def _manifest(path: Path) -> dict[str, Any] | None:
    """What the checkpoint says of itself; None where it is not whole, or the manifest itself is damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(manifest, dict) and all(
        isinstance(manifest.get(name), kind) for name, kind in _MANIFEST_KINDS.items()
    )
    return manifest if whole else None


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, value now and value then of each setting that is not the same; `model.hidden_size` of what is inside."""
    for name, value in now.items():
        before = then.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from ((f"{name}.{inner}", *values) for inner, *values in _differences(value, before))
        elif name not in then or before != value:
            yield name, value, before


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns a full disk, a file in the directory's place and the like into a UserError."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]  # CheckpointException tells of all ranks, with tracebacks
        raise UserError(
            f"cannot write the checkpoint {path} ({reason}); make room or choose another output_dir"
        ) from error


@contextmanager
def _reading(path: Path, *damage: type[BaseException]) -> Iterator[None]:
    """Turns what a damaged file raises into a UserError."""
    try:
        yield
    except damage as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
        raise UserError(f"{path} is damaged ({reason}); resume from another checkpoint") from error


def rng_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators on this rank, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the generators back where `rng_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _loop_file(path: Path, rank: int) -> Path:
    return path / "loop" / f"rank_{rank:05d}.pt"
