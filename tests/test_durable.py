"""What vouches for files comes to the disk after them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalign import durable
from megalign.checkpoints.job import Job
from megalign.conversion.hf_config import write_json
from megalign.conversion.hf_writer import HfWriter
from megalign.trainers import manifest


class Events:
    """What the process has put on the disk, and what it has renamed, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Path]] = []

    def synced(self, *, before: Path | None = None, after: Path | None = None) -> set[Path]:
        """Files and directories by the names that they had, before or after another got its name."""
        first = 0 if after is None else self.all.index(("rename", after))
        last = len(self.all) if before is None else self.all.index(("rename", before))
        return {path for what, path in self.all[first:last] if what == "sync"}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    found = Events()
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        sync(descriptor)
        found.all.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        found.all.append(("rename", Path(target)))

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return found


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest(events: Events, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-3"
    names = ["trainer_state.json", "engine/metadata.json", "engine/hugging_face/config.json"]
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    durable.write(path / "engine/__1_0.distcp", b"another rank's")
    events.all.clear()
    sums = {"engine/__1_0.distcp": "0" * 32}
    manifest.write_manifest(path, {"step": 3, "settings": {}, "layout": {}}, sums)
    wanted = {path / name for name in (*names, "manifest.json.tmp", "engine", "engine/hugging_face", ".")}
    assert events.synced(before=path / "manifest.json") == wanted
    assert events.synced(after=path / "manifest.json") == {path, tmp_path}


def test_a_conversions_output_is_on_the_disk_before_it_has_its_name(events: Events, tmp_path: Path) -> None:
    with Job().output(tmp_path / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text("content")
    assert events.synced(before=tmp_path / "out") == {partial, partial / "inner", partial / "inner/file"}
    assert events.synced(after=tmp_path / "out") == {tmp_path}


@pytest.mark.parametrize("exists", [False, True])
def test_a_model_is_on_the_disk_before_it_has_its_name(exists: bool, events: Events, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_json(source / "config.json", {"model_type": "qwen2"})
    if exists:
        out.mkdir()
    writer = HfWriter(out, source, max_shard_size=40)
    for name in "ab":
        writer.add(name, torch.ones(10))
    writer.close()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    partial = writer.shard_file(0).parent
    first = out / "config.json" if exists else out  # the last of all names
    assert {partial, *(partial / name for name in (*shards, "config.json"))} <= events.synced(before=first)
    assert not exists or out in events.synced(before=first)
    assert events.synced(after=first) == {out if exists else tmp_path}
    assert [path for what, path in events.all if what == "rename"][-1] == first


def test_a_file_system_that_syncs_no_directory_is_none_that_loses_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    durable.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        durable.sync(tmp_path / "file")
