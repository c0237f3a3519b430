"""What makes checkpoint-{step}/ a checkpoint: its manifest, which lists every file with its checksum, written last.

A directory without one is not whole and is never resumed from.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megalign import durable
from megalign.checkpoints.checksums import MANIFEST, checksum, first_fault, read_manifest
from megalign.errors import UserError
from megalign.parallel.control import gather_objects
from megalign.parallel.groups import Axis
from megalign.trainers.run_file import read_run

LATEST = "latest"
_ASIDE = ".old"  # suffix of a whole checkpoint that is being replaced
_PATIENCE = 60.0  # seconds for which NFS, if nobody says otherwise, may answer from what it knew of a directory


def write_manifest(path: Path, content: Mapping[str, Any], checksums: Mapping[str, str]) -> None:
    """Declares the checkpoint whole, once all of it is on the disk.

    Files that are not among the ranks' `checksums`, who have put those there, are summed up here.
    """
    listed = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    files = {
        name: {"bytes": _size(path / name), "xxh3_128": checksums.get(name) or checksum(path / name)}
        for name in sorted(listed | checksums.keys())  # a network file system may list late what another node wrote
    }
    durable.sync_tree(path, but={path / name for name in checksums})
    unfinished = path / f"{MANIFEST}.tmp"
    whole = {**content, "written": _now(path.parent), "files": files}
    durable.write(unfinished, json.dumps(whole, indent=1).encode())
    durable.rename(unfinished, path / MANIFEST)  # half a manifest never counts as one
    durable.sync(path.parent)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file} is not seen on {socket.gethostname()}, where rank 0 is: all nodes must share output_dir"
        ) from error


def find_checkpoint(output_dir: str, resume: str | bool | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or for "latest" or True the run's newest whole one.

    Which run's, run.json says; without that file (the checkpoints were copied) it is the newest of all.
    """
    if resume is None or resume is False or resume == "":
        return None
    if resume is True or resume == LATEST:
        run, whole = read_run(output_dir), whole_checkpoints(output_dir)
        own = [path for path in whole if not run or manifest_of(path).get("run") == run["run"]]
        return own[-1] if own else None
    path = Path(str(resume))
    if not path.is_dir():
        raise UserError(
            f"resume_from_checkpoint={resume} is not a directory; give a checkpoint-N directory or {LATEST}"
        )
    if not (path / MANIFEST).exists():
        raise UserError(f"{path} has no {MANIFEST}, so it was not written to its end; {other_than(path)}")
    if read_manifest(path) is None:
        raise UserError(f"{path / MANIFEST} is damaged; {other_than(path)}")
    return path


def await_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Returns when this rank reads the manifest that rank 0 has read; raises an OSError if it does not get to."""
    end = time.monotonic() + _PATIENCE
    while read_manifest(path) != content:
        if time.monotonic() > end:
            raise FileNotFoundError(f"{path / MANIFEST} is not on {socket.gethostname()} what rank 0 reads there")
        time.sleep(0.1)


def files_like(path: Path, pattern: str) -> list[Path]:
    """The checkpoint's files of such names, in order; not as a directory lists them, which may be late."""
    return [path / name for name in sorted(manifest_of(path)["files"]) if fnmatch(name, pattern)]


def other_than(path: Path) -> str:
    """The way out of a checkpoint that cannot be used."""
    others = [other for other in whole_checkpoints(path.parent) if other.name != path.name]
    if not others:
        return "there is no other whole checkpoint beside it: start without resume_from_checkpoint"
    return f"resume_from_checkpoint={others[-1]} is the newest whole one beside it"


def manifest_of(path: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself."""
    manifest = read_manifest(path)
    assert manifest is not None, "find_checkpoint gives no other"
    return manifest


def check_settings(path: Path, settings: Mapping[str, Any], hints: Mapping[str, str]) -> None:
    """Raises unless the checkpoint was made with these settings (JSON's types); `hints` say more of some."""
    then = manifest_of(path)["settings"]
    for name, value, before in differences(json.loads(json.dumps(dict(settings))), then):
        hint = f" ({hints[name]})" if name in hints else ""
        raise UserError(
            f"{name} is {value} but {path} was made with {before}{hint}; resuming needs the same models, data and rows "
            f"of an optimizer step: set {name} back, or start without resume_from_checkpoint"
        )


def check_files(path: Path, world: Axis) -> None:
    """Raises on every rank unless every file is what the manifest says; each rank reads its share. Collective."""
    files = [(path / name, then) for name, then in manifest_of(path)["files"].items()]
    fault = first_fault(files[world.rank :: world.size])
    for told in filter(None, gather_objects(fault, world)):
        raise UserError(f"{told}; {other_than(path)}")


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, value now and value then of each setting that is not the same; `model.hidden_size` of what is inside."""
    for name, value in now.items():
        before = then.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from ((f"{name}.{inner}", *values) for inner, *values in differences(value, before))
        elif name not in then or before != value:
            yield name, value, before


def rotate_checkpoints(output_dir: str, limit: int | None, newest: Path) -> None:
    """Deletes what was put aside for a whole checkpoint, and the oldest ones beyond `save_total_limit`.

    Never the one just written.
    """
    for path in checkpoints(output_dir):
        if path.suffix and read_manifest(path.with_suffix("")) is not None:
            _remove(path)
    others = [path for path in checkpoints(output_dir) if path.name != newest.name]
    for path in others[: max(0, len(others) + 1 - limit)] if limit else []:
        _remove(path)


def make_room(path: Path) -> None:
    """Nothing is left at `path`, where a checkpoint is to be written; a whole one is put aside until that is whole."""
    if read_manifest(path) is not None:
        aside = path.with_suffix(_ASIDE)
        if aside.exists():
            _remove(aside)
        path.rename(aside)
    elif path.exists():  # left by a run that was killed
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # first, so that a killed deletion leaves nothing that looks whole
    shutil.rmtree(path)


def whole_checkpoints(output_dir: str | Path) -> list[Path]:
    """Those of `checkpoints` that can be resumed from."""
    return [path for path in checkpoints(output_dir) if read_manifest(path) is not None]


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint-N directories in the order in which they were written; those that are not whole come first.

    With them checkpoint-N.old, put aside by a run that was killed before its own checkpoint-N was whole.

    Not by step: an earlier, longer run in the same directory would be taken for the newest, and this run's own
    checkpoints be rotated away.
    """
    found = [
        (_written(path), int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(rf"checkpoint-(\d+)({re.escape(_ASIDE)})?", path.name)) and path.is_dir()
    ]
    return [path for *_, path in sorted(found)]


def _now(output_dir: Path) -> float:
    """Later than all that was written there, by another host perhaps, whose clock was ahead."""
    return max([time.time(), *(_written(path) + 0.001 for path in checkpoints(output_dir))])


def _written(path: Path) -> float:
    manifest = read_manifest(path)
    return 0.0 if manifest is None else float(manifest["written"])
