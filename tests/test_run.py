"""tests/run.sh: what pytest is asked for, and that none is left when the script is ended. Stand-ins note and wait."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.jobs.start import ROOT, signalled_before

PYTEST = f"""#!{sys.executable}
import json, os, sys, time
with open("calls", "a") as calls:
    print(json.dumps([os.getpid(), os.environ.get("MEGALIGN_MEGATRON"), sys.argv[3:]]), file=calls)
time.sleep(float(os.environ["SECONDS_OF_TESTS"]))
"""
QUICK = "not vllm and not ranks8 and not slow and not gpu"
NEWEST = "megatron and not vllm"


def started(tmp_path: Path, *words: str, seconds: float = 0.0, **environ: str) -> subprocess.Popen[bytes]:
    for name in ("tests/run.sh", "tools/requirements-megatron-newest.txt"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in (("tools/install.sh", ""), (".venv/bin/ruff", "#!/bin/sh\n"), (".venv/bin/python", PYTEST)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "SECONDS_OF_TESTS": str(seconds), **environ}
    command = ["bash", str(tmp_path / "tests/run.sh"), *words]
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=heed_interrupts)


def heed_interrupts() -> None:
    """A shell cannot trap what was ignored when it began, as it is for a job in the background of another."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def calls(tmp_path: Path) -> list[tuple[int, str | None, list[str]]]:
    file = tmp_path / "calls"
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def of_session(session: int) -> list[psutil.Process]:
    """What the script has started and what they have, those that have ended apart: they may wait for init to take note.

    A lane is a process group of its own, and outlives the script's children where it outlives the script.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_of(script: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What goes on after the script: a lane's last process may end a moment later, as no child of the script's."""
    end = time.monotonic() + 30
    while (left := of_session(script.pid)) and time.monotonic() < end:
        time.sleep(0.02)
    return left


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["quick", "-x"], [["-m", QUICK, "-x"]]),
        (["quick", "-m", "gpu or slow", "-x"], [["-m", f"{QUICK} and (gpu or slow)", "-x"]]),
        (["newest", "-m", "vllm", "a.py"], [["-m", "vllm", "a.py"]]),
        (["-mslow"], [["-m", f"{NEWEST} and (slow)", "-p", "no:cacheprovider"], ["-mslow"]]),
        (["a.py", "-k", "b c"], [["-m", NEWEST, "a.py", "-k", "b c", "-p", "no:cacheprovider"], ["a.py", "-k", "b c"]]),
    ],
)
def test_marks_of_the_arguments_and_the_scripts_own_hold_both(
    words: list[str], asked: list[list[str]], tmp_path: Path
) -> None:
    assert started(tmp_path, *words).wait(timeout=30) == 0
    assert sorted(given for *_, given in calls(tmp_path)) == sorted(asked)
    for _, version, given in calls(tmp_path):
        assert (version is not None) == (words[0] == "newest" or NEWEST in " ".join(given))


def test_all_tests_are_run_once_and_those_that_are_marked_twice(tmp_path: Path) -> None:
    assert started(tmp_path).wait(timeout=30) == 0
    first, newest, alone = sorted((given for *_, given in calls(tmp_path)), key=lambda given: given[0][:3])
    assert newest == ["-m", NEWEST, "-p", "no:cacheprovider"]
    assert [f"--ignore={name}" for name in alone[:-2]] == first and alone[-2:] == ["-p", "no:cacheprovider"]
    assert all((ROOT / name).is_dir() for name in alone[:-2])


def end_all(script: subprocess.Popen[bytes]) -> None:
    """Whatever a failed test leaves."""
    for process in of_session(script.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    script.wait()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_no_lane_outlives_the_script(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    script = started(tmp_path, seconds=60.0)
    try:
        end = time.monotonic() + 30
        while len(calls(tmp_path)) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert len(calls(tmp_path)) == 2
        script.send_signal(sent)  # to the script alone
        assert script.wait(timeout=60) == status
        assert not left_of(script)
        assert len(calls(tmp_path)) == 2
    finally:
        end_all(script)


@pytest.mark.parametrize("before", ["second=$!", "first=$!"])
def test_a_lane_that_has_no_name_yet_does_not_outlive_the_script(before: str, tmp_path: Path) -> None:
    script = started(tmp_path, seconds=60.0, **signalled_before(before, "TERM", tmp_path))
    try:
        assert script.wait(timeout=60) == 143
        assert not left_of(script)
    finally:
        end_all(script)
