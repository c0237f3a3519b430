"""Who writes a directory holds a lock, that no killed process keeps and no removed file is."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalign.errors import UserError
from megalign.output_lock import OutputLock
from tests.jobs.start import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from megalign.output_lock import OutputLock
lock = OutputLock(Path(sys.argv[1]), Path(sys.argv[1]).parent)
lock.take()
print("held", flush=True)
time.sleep(60)
"""


def lock(tmp_path: Path) -> OutputLock:
    return OutputLock(tmp_path / "out", tmp_path)


def refused(tmp_path: Path) -> str:
    with pytest.raises(UserError) as told:
        lock(tmp_path).take()
    return str(told.value)


def test_a_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert refused(tmp_path).startswith(f"{tmp_path}/out is being written by another process, which holds")
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / ".out.lock").exists()
    mine = lock(tmp_path)
    mine.take()
    assert "is being written" in refused(tmp_path)
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_removed_before_it_was_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, flock = lock(tmp_path), lock(tmp_path), fcntl.flock
    first.take()

    def late(file: Any, how: int) -> None:
        first.release()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second.take()
    assert "is being written" in refused(tmp_path)


def test_a_file_system_without_locks_is_told_of_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(file: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    unlocked = lock(tmp_path)
    unlocked.take()
    assert "Function not implemented" in capsys.readouterr().err
    unlocked.release()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot lock .*/nowhere/\.out\.lock .*choose a directory that can be written"):
        OutputLock(tmp_path / "nowhere/out", tmp_path / "nowhere").take()
