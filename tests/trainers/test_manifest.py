"""Which checkpoints there are, without a run that wrote them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megalign.checkpoints.checksums import checksum
from megalign.checkpoints.find import manifest_of
from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.parallel.groups import initialize
from megalign.trainers import manifest
from megalign.trainers.checkpointing import Checkpoints
from megalign.trainers.run_file import write_run
from tests.ranks import run_ranks


def write_checkpoint(output_dir: Path, step: int, run: str | None = None) -> Path:
    """A whole one of a single file."""
    path = output_dir / f"checkpoint-{step}"
    (path / "loop").mkdir(parents=True)
    (path / "loop/run.pt").write_text(f"{path}")
    manifest.write_manifest(path, {"step": step, "run": run, "settings": {}, "layout": {}}, {})
    return path


def test_a_checkpoint_is_the_newest_though_its_hosts_clock_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [write_checkpoint(tmp_path, 8)]  # of an earlier, longer run
    monkeypatch.setattr(time, "time", lambda: 1e9)  # of 2001
    kept += [write_checkpoint(tmp_path, step) for step in (2, 4, 6)]
    assert manifest.whole_checkpoints(tmp_path) == kept
    assert manifest.find_checkpoint(str(tmp_path), "latest") == kept[-1]
    assert str(kept[2]) in manifest.other_than(kept[-1])
    manifest.rotate_checkpoints(str(tmp_path), 2, kept[-1])
    assert manifest.whole_checkpoints(tmp_path) == kept[2:]


@pytest.mark.parametrize("key", ["bytes", "xxh3_128", "files", "written", "step", "settings", "layout"])
def test_a_flipped_bit_in_a_name_of_the_manifest_makes_it_a_damaged_one(key: str, tmp_path: Path) -> None:
    whole, damaged = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    file = damaged / "manifest.json"
    text = file.read_text()
    assert text.count(f'"{key}"') == 1
    file.write_text(text.replace(f'"{key}"', f'"{chr(ord(key[0]) ^ 1)}{key[1:]}"'))
    assert manifest.find_checkpoint(str(tmp_path), "latest") == whole
    with pytest.raises(UserError, match=f"{file} is damaged; resume_from_checkpoint={whole} is the newest whole"):
        manifest.find_checkpoint(str(tmp_path), str(damaged))
    with pytest.raises(UserError, match=f"{file} is damaged, or no trainer's"):
        manifest_of(damaged / "engine")


def test_the_latest_is_of_the_run_that_goes_on_in_the_directory(tmp_path: Path) -> None:
    first, _ = write_checkpoint(tmp_path, 2, "one"), write_checkpoint(tmp_path, 4, "another")
    for run, latest in (("one", first), ("a third, which has saved nothing", None)):
        write_run(tmp_path, {"run": run})
        assert manifest.find_checkpoint(str(tmp_path), "latest") == latest
    assert manifest.find_checkpoint(str(tmp_path), str(first)) == first
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is damaged; remove it, and latest means the newest whole"):
        manifest.find_checkpoint(str(tmp_path), "latest")


@pytest.mark.parametrize("name", ["../loop/run.pt", "/etc/hostname", "loop/../../run.pt", None])
def test_a_manifest_of_no_files_or_of_files_elsewhere_is_damaged(name: str | None, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2)
    content = json.loads((path / "manifest.json").read_text())
    files = {} if name is None else content["files"] | {name: content["files"]["loop/run.pt"]}
    (path / "manifest.json").write_text(json.dumps({**content, "files": files}))
    with pytest.raises(UserError, match="checkpoint-2/manifest.json is damaged"):
        manifest.find_checkpoint(str(tmp_path), str(path))


def test_a_file_that_the_manifest_does_not_list_is_not_the_checkpoints(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2)
    (path / "loop/rank_00001.pt").write_text("of another run")
    assert [file.name for file in manifest.files_like(path, "loop/*.pt")] == ["run.pt"]


# ---- nodes that do not see the same


def _find_beside_a_late_rank(output_dir: str, looks: int, patience: float = 60.0) -> tuple[str, list[str]]:
    """The last rank's first looks show the directory as it was before checkpoint-4 was written."""
    groups = initialize(SFTConfig(output_dir=output_dir, bf16=False, tensor_model_parallel_size=2))
    said: list[str] = []
    checkpoints = Checkpoints(SFTConfig(output_dir=output_dir), groups, said.append)
    read, left = manifest.read_manifest, iter(range(looks if groups.world.rank == 1 else 0))

    def read_late(path: Path) -> dict[str, Any] | None:
        return None if path.name == "checkpoint-4" and next(left, None) is not None else read(path)

    with mock.patch.multiple(manifest, read_manifest=read_late, _PATIENCE=patience):
        try:
            return str(checkpoints.find("latest")), said
        except UserError as error:
            return str(error), said


def test_a_rank_that_sees_a_checkpoint_late_waits_for_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    assert run_ranks(2, _find_beside_a_late_rank, str(tmp_path), 2) == [(f"{tmp_path}/checkpoint-4", [])] * 2


def test_a_rank_that_never_sees_it_ends_the_run_on_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    for told, _ in run_ranks(2, _find_beside_a_late_rank, str(tmp_path), 1000, 0.5):
        assert told.startswith(f"{tmp_path}/checkpoint-4/manifest.json is not on ") and "all nodes share" in told


def test_nothing_to_resume_from_is_found_and_said_once_for_all(tmp_path: Path) -> None:
    for found, said in run_ranks(2, _find_beside_a_late_rank, str(tmp_path), 0):
        assert found == "None" and said == [f"no checkpoint in {tmp_path} yet: training starts afresh"]


def test_a_file_that_a_rank_wrote_and_rank_0_does_not_see_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2)
    (path / "manifest.json").unlink()
    content = {"step": 2, "settings": {}, "layout": {}}
    sums = {"loop/run.pt": checksum(path / "loop/run.pt"), "loop/rank_00001.pt": "0" * 32}
    with pytest.raises(OSError, match=r"loop/rank_00001.pt is not seen on .*: all nodes must share output_dir"):
        manifest.write_manifest(path, content, sums)
    assert not (path / "manifest.json").exists()


def test_a_file_that_rank_0s_listing_lacks_is_still_in_the_manifest(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2)
    with mock.patch.object(Path, "rglob", lambda *given: iter(())):
        manifest.write_manifest(path, {"step": 2, "settings": {}, "layout": {}}, {"loop/run.pt": "f" * 32})
    assert [file.name for file in manifest.files_like(path, "loop/*.pt")] == ["run.pt"]
