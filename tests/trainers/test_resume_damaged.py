"""A checkpoint's files: listed with their checksums, and named when they are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megalign.checkpoints.inspect import summary_of
from megalign.errors import UserError
from megalign.trainers import manifest
from megalign.trainers.manifest import find_checkpoint
from tests.megatron_version import wanted_version
from tests.ranks import run_ranks
from tests.trainers.resume_runs import ROWS, resume_error, saving_fields
from tests.trainers.runs import train_sft


def test_the_manifest_lists_every_file_with_its_checksum(model: str, tmp_path: Path) -> None:
    run_ranks(2, train_sft, model, ROWS, saving_fields(tmp_path, tensor_model_parallel_size=2))
    path = tmp_path / "checkpoint-3"
    content = json.loads((path / "manifest.json").read_text())
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    files.pop("manifest.json")
    assert content["files"] == {
        name: {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)} for name, data in files.items()
    }
    assert {"trainer_state.json", "loop/run.pt", "loop/replica_00000.pt", "loop/rank_00001.pt"} <= files.keys()
    assert content["layout"]["tp"] == 2
    assert summary_of(path).layout == {"tp": 2, "etp": 2}


ENGINE_FILES = ["engine/.metadata", "engine/__0_0.distcp", "engine/metadata.json"]


if wanted_version().startswith("0.16."):  # a newer Megatron-Core writes what was in it into the others
    ENGINE_FILES.append("engine/common.pt")


LOOP_FILES = ["loop/run.pt", "loop/replica_00000.pt", "loop/rank_00000.pt", "trainer_state.json"]


def _flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("file", [*ENGINE_FILES, *LOOP_FILES])
def test_a_damaged_file_is_named_and_an_older_checkpoint_offered(
    file: str, model: str, made: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-2")
    damaged = shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-3") / file
    _renew(older, written=0.0)
    content = damaged.read_bytes()
    before = _all_bytes(tmp_path)
    for changed, fault in [
        (content[:-1], f"has {len(content) - 1} bytes where its manifest says {len(content)}"),
        (_flip_a_bit(content), "is damaged: its checksum is not the one in its manifest"),
    ]:
        damaged.write_bytes(changed)
        (error,) = run_ranks(1, resume_error, model, saving_fields(tmp_path))
        assert error == f"{damaged} {fault}; resume_from_checkpoint={older} is the newest whole one beside it"
    damaged.write_bytes(content)
    assert _all_bytes(tmp_path) == before, "a refused checkpoint is left as it is"


NO_TEXT, HALF_A_NUMBER = b"\x80", b"\x80\x02M"  # JSON is text; a pickle


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *((file, None) for file in [*ENGINE_FILES, *LOOP_FILES]),
        ("engine/metadata.json", NO_TEXT),
        ("loop/run.pt", HALF_A_NUMBER),
    ],
)
def test_a_file_that_was_damaged_before_it_was_summed_up_is_named(
    file: str, content: bytes | None, model: str, made: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-3")
    named = checkpoint / "engine" if file.startswith("engine") else checkpoint / file
    (checkpoint / file).write_bytes(bytes((checkpoint / file).stat().st_size) if content is None else content)
    _renew(checkpoint)
    (error,) = run_ranks(1, resume_error, model, saving_fields(tmp_path))
    assert error.startswith(f"{named} is damaged (") and "; there is no other whole checkpoint beside it" in error


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_a_checkpoint_with_a_damaged_manifest_is_not_whole(content: str, made: Path, tmp_path: Path) -> None:
    for step in (3, 4):
        shutil.copytree(made / "checkpoint-3", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4" / "manifest.json").write_text(content)
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-3"
    with pytest.raises(UserError, match="checkpoint-4/manifest.json is damaged; resume_from_checkpoint=.*-3 is"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-4"))


def _renew(checkpoint: Path, **changes: Any) -> None:
    """A manifest of the files as they are."""
    then = json.loads((checkpoint / "manifest.json").read_text())
    manifest.write_manifest(checkpoint, then, {})
    now = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**now, **changes}))


def _all_bytes(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
