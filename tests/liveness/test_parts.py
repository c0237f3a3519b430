"""The parts of the watch by themselves: strangers at rank 0's port, files that cannot be written, timers."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megalign.liveness import node, pace, star
from megalign.liveness.reason import Reason


class Store:
    """What torch.distributed's does."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        """Keeps it."""
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        """What was kept."""
        return self.values[key]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def first(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[star.Star]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)  # nothing takes it back
    found = star.Star(0, store)
    yield found
    found.leave()


def polled(first: star.Star) -> tuple[list[int], list[Reason]]:
    """What a few looks find."""
    news = [first.poll(0.02) for _ in range(6)]
    return [rank for died, _ in news for rank in died], [reason for _, reason in news if reason is not None]


@pytest.mark.parametrize(
    "sent",
    [b"\xff\xfe\x00 1\n", "тайна 1\n".encode(), b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b'{"status": 0}\n', b""],
    ids=["bytes", "another alphabet", "HTTP", "no end", "a reason", "silence"],
)
def test_a_stranger_is_hung_up_on_and_disturbs_nobody(
    sent: bytes, first: star.Star, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = first._listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        stranger.sendall(sent)
        assert polled(first) == ([], [])
        with monkeypatch.context() as patience:
            patience.setattr(star, "_GREETING", 60.0 if sent else 0.0)
            assert polled(first) == ([], [])
        with contextlib.suppress(ConnectionResetError):  # where some of what it sent was not read
            assert stranger.recv(1) == b""
    rank = star.Star(1, store)
    rank.say(Reason(status=3, text="все"))
    assert polled(first) == ([], [Reason(status=3, text="все")])
    rank._drop()
    assert polled(first) == ([1], [])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_reason_that_cannot_be_written_keeps_nobody(place: Path) -> None:
    mine = node.Node(0, 2, job="a")
    (directory,) = place.iterdir()
    shutil.rmtree(directory)  # as a cleaner of temporary files does
    assert mine.announce(Reason(status=1)) is True
    assert mine.reason() is None and mine.dead() == []
    mine.leave()


def test_a_second_thread_that_speaks_leaves_what_the_first_has_said(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, link, heard = node.Node(0, 2, job="a"), os.link, []

    def link_and_speak(*given: Any) -> None:
        link(*given)  # where there is a reason already, the second's raises here
        with ThreadPoolExecutor() as watch:
            heard.append(watch.submit(mine.announce, Reason(status=2)).result())

    monkeypatch.setattr(os, "link", link_and_speak)
    assert mine.announce(Reason(status=1)) is True
    assert heard == [False] and mine.reason() == Reason(status=1)
    assert [file.name for file in mine._directory.iterdir() if file.name not in ("0", "reason")] == []


def test_a_watch_that_is_late_sets_no_timer_of_a_run_that_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[Any] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *words, **_: timers.append(words))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", timers.clear)
    monkeypatch.setattr(pace, "_RENEWED", -1.0)
    found = pace.Pace(60)
    found.overdue()
    assert len(timers) == 2
    found.end()
    found.overdue()
    assert timers == []


def test_stacks_that_cannot_be_written_go_to_stderr_in_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hangs = tmp_path / "hangs"
    os.mkfifo(hangs)  # opening it waits for a reader: as a file system that does not answer
    (tmp_path / "file").touch()
    for path in (hangs, tmp_path / "file" / "under.txt"):
        started = time.monotonic()
        pace.dump_stacks(path, "why", seconds=0.2)
        assert time.monotonic() - started < 5
        told = capfd.readouterr().err
        assert told.startswith(f"{path} cannot be written\n") and "in dump_stacks" in told
    hangs.read_bytes()  # lets the thread go
    pace.dump_stacks(tmp_path / "stacks" / "rank.txt", "why", seconds=5)
    written = (tmp_path / "stacks" / "rank.txt").read_text()
    assert written.startswith("why\n\n") and "in dump_stacks" in written
    assert capfd.readouterr().err == ""
