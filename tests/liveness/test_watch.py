"""Processes that know of each other: who died is named by all others, who leaves in good order by none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.jobs.start import error_lines

RANK = """
import io, os, sys, threading, time
from functools import partial
from pathlib import Path

from megalign import liveness
from megalign.liveness import node
from megalign.liveness.launcher import started
from megalign.failure import report_error

class Store:  # what torch.distributed's does, through files
    def set(self, key, value):
        Path(key.replace("/", "-") + ".new").write_text(value)
        Path(key.replace("/", "-") + ".new").rename(key.replace("/", "-"))

    def get(self, key):
        while not Path(key.replace("/", "-")).exists():
            time.sleep(0.01)
        return Path(key.replace("/", "-")).read_bytes()

def everybody(name):
    Path(f"{name}.{rank}").touch()
    while len(list(Path().glob(f"{name}.*"))) < world:
        time.sleep(0.01)

def held():
    threading.Thread(target=time.sleep, args=(60,)).start()  # Python does not end before it

def as_torch_does(previous, *error):  # its hook, which init_process_group sets
    sys.stderr = io.StringIO()
    previous(*error)
    text, sys.stderr = sys.stderr.getvalue(), sys.__stderr__
    sys.stderr.write(f"[rank{rank}]: {text}")

def fails_in_a_stall():  # in which rank 0 dies; nothing of this process runs until the wait for a verdict is over
    mine, begun, held = liveness.watch._watch._node, threading.Event(), threading.Event()
    look = mine.dead

    def began_before_the_death():
        mine.dead, found = look, look()
        begun.set()
        held.wait()
        return found

    mine.dead = began_before_the_death
    begun.wait()
    Path("looking").touch()
    while started(mine._alive[0].process):
        time.sleep(0.01)
    threading.Timer(0.3, held.set).start()
    liveness.await_verdict(0.1)
    os._exit(7)

def dies_unseen():
    while not Path("looking").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), 9)

rank, world, how = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
liveness.start(rank, world)
if "joined" in how:
    sys.excepthook = partial(as_torch_does, sys.excepthook)
    liveness.join(Store())
if "dies" in how:
    node._PATIENCE = 1.0
    exec("os.kill(os.getpid(), 9)" if rank == 0 else "time.sleep(60)")
everybody("here")
node._PATIENCE = 1.0  # no earlier: until all have come, a file may be of one that still starts
time.sleep(0.6)  # everybody has looked at everybody
exec({
    "waits": "time.sleep(60)",
    "leaves": "sys.exit() if rank == 1 else time.sleep(2)",
    "raises": "held(); assert rank != 1, 'a bug'; time.sleep(60)",
    "exits": "held(); exec('with liveness.limited(60, \\"out\\"): rank == 1 and sys.exit(3); time.sleep(60)')",
    "reports": "report_error('wrong') if rank == 1 else time.sleep(60)",
    "breaks": "rank == 1 and setattr(liveness.watch._watch._node, 'dead', lambda: {}[7]); time.sleep(60)",
    "fails": "dies_unseen() if rank == 0 else fails_in_a_stall()",
    "stands": "exec('with liveness.limited(4, \\"out\\"): time.sleep(60)')",
}[how.split()[-1]])
"""


class Ranks:
    """Processes without a launcher that would end one for another."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], stderr: Path) -> None:
        self.processes, self._stderr = processes, stderr

    def statuses(self, timeout: float = 20) -> list[int | None]:
        end = time.monotonic() + timeout
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        return [process.poll() for process in self.processes]

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()


@contextlib.contextmanager
def ranks(how: str, place: Path, *, world: int = 3, nodes: int = 1, pause: float = 0) -> Iterator[Ranks]:
    """Each of several nodes has a directory for temporary files of its own."""
    for node in range(nodes):
        (place / f"node{node}").mkdir(exist_ok=True)
    root = str(Path(__file__).parents[2])
    shared = {**os.environ, "PYTHONPATH": root, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    with (place / "stderr").open("ab") as stderr:
        processes = [
            time.sleep(pause * rank)
            or subprocess.Popen(
                [sys.executable, "-c", RANK, how],
                cwd=place,
                env={**shared, "RANK": str(rank), "TMPDIR": str(place / f"node{rank % nodes}")},
                stderr=stderr,
            )
            for rank in range(world)
        ]
        try:
            yield Ranks(processes, place / "stderr")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def wait_until_all_are_here(place: Path, world: int = 3) -> None:
    end = time.monotonic() + 60
    while len(list(place.glob("here.*"))) < world:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.6)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("how", "nodes"), [("waits", 1), ("joined waits", 3)])
def test_a_killed_rank_is_named_by_every_node_and_ends_all(how: str, nodes: int, victim: int, tmp_path: Path) -> None:
    with ranks(how, tmp_path, nodes=nodes) as job:
        wait_until_all_are_here(tmp_path)
        os.kill(job.processes[victim].pid, signal.SIGKILL)  # it stays a zombie: nobody has waited for it yet
        statuses = job.statuses()
    assert statuses == [-9 if rank == victim else 1 for rank in range(3)]
    lines = error_lines(job.stderr)
    where = f"process {job.processes[victim].pid}" if nodes == 1 else "its connection is closed"
    assert len(lines) == (1 if nodes == 1 else 2)
    assert all(f"rank {victim} ({where}) has died" in line for line in lines), lines


def test_a_rank_that_died_before_another_came_is_named(tmp_path: Path) -> None:
    with ranks("dies first", tmp_path, world=2, pause=1.5) as job:
        assert job.statuses() == [-9, 1]
    (line,) = error_lines(job.stderr)
    assert f"rank 0 (process {job.processes[0].pid}) has died" in line


def test_two_that_die_at_once_are_both_named(tmp_path: Path) -> None:
    with ranks("waits", tmp_path) as job:
        wait_until_all_are_here(tmp_path)
        stop(job.processes[1:])  # or they might see the first before the second has died
        for victim in job.processes[:2]:
            victim.kill()
            os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        job.processes[2].send_signal(signal.SIGCONT)
        assert job.statuses() == [-9, -9, 1]
    (line,) = error_lines(job.stderr)
    assert "rank 0 (" in line and "rank 1 (" in line and "have died" in line


def test_a_collective_that_fails_waits_for_a_look_that_began_after_the_death(tmp_path: Path) -> None:
    with ranks("fails", tmp_path, world=2) as job:
        assert job.statuses() == [-9, 1]
    (line,) = error_lines(job.stderr)
    assert f"rank 0 (process {job.processes[0].pid}) has died" in line


@pytest.mark.parametrize("nodes", [1, 3])
def test_who_leaves_in_good_order_has_not_died(nodes: int, tmp_path: Path) -> None:
    with ranks("joined leaves", tmp_path, nodes=nodes) as job:
        assert job.statuses() == [0, 0, 0]
    assert job.stderr == ""
    assert not list(tmp_path.rglob("megalign-*.ranks")), "the last one clears up"


@pytest.mark.parametrize(("how", "nodes"), [("raises", 1), ("joined raises", 1), ("joined raises", 3)])
def test_an_uncaught_exception_ends_all_though_threads_hold_the_process(how: str, nodes: int, tmp_path: Path) -> None:
    with ranks(how, tmp_path, nodes=nodes) as job:
        assert job.statuses() == [1, 1, 1]
    prefix = "[rank1]: " if "joined" in how else ""
    assert f"{prefix}Traceback (most recent call last)" in job.stderr
    line = "rank 1 has ended with AssertionError: a bug, so the other ranks end; its own output says where"
    assert error_lines(job.stderr) == [f"megalign: error: {line}"] * nodes


def test_a_rank_that_leaves_the_training_by_itself_ends_all_with_its_status(tmp_path: Path) -> None:
    with ranks("exits", tmp_path) as job:
        assert job.statuses() == [3, 3, 3]
    (line,) = error_lines(job.stderr)
    assert "rank 1 has ended with sys.exit(3), so the other ranks end" in line


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_reported_error_ends_the_others_without_another_word(nodes: int, tmp_path: Path) -> None:
    with ranks("joined reports", tmp_path, nodes=nodes) as job:
        assert [job.statuses()[rank] for rank in (0, 2)] == [2, 2]
    assert job.stderr == "megalign: error: wrong\n"


def test_a_watch_that_fails_ends_the_job_and_says_why(tmp_path: Path) -> None:
    with ranks("joined breaks", tmp_path, nodes=3) as job:
        assert job.statuses() == [1, 1, 1]
    why = "rank 1 cannot watch over the others any more (KeyError: 7, in <lambda> at <string>:"
    assert [why in line for line in error_lines(job.stderr)] == [True] * 3


@pytest.mark.parametrize("nodes", [1, 3])
def test_standing_still_leaves_every_ranks_stack(nodes: int, tmp_path: Path) -> None:
    with ranks("joined stands", tmp_path, nodes=nodes) as job:
        assert job.statuses() == [1, 1, 1]
    lines = error_lines(job.stderr)
    assert lines and all("has stood still for 4 s (ddp_timeout) at " in line for line in lines), job.stderr
    for rank in range(3):
        stack = (tmp_path / "out" / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert f"rank {rank}, process {job.processes[rank].pid} on " in stack
        assert 'File "<string>", line 1 in <module>' in stack


def test_what_an_earlier_job_of_the_same_launcher_left_ends_nobody(tmp_path: Path) -> None:
    with ranks("waits", tmp_path) as job:
        wait_until_all_are_here(tmp_path)
        stop(job.processes)  # or one might see another's death, and leave
        for process in job.processes:
            process.kill()
        job.statuses()
    (directory,) = tmp_path.rglob("megalign-*.ranks")
    assert {"0", "1", "2"} <= {file.name for file in directory.iterdir()}
    (directory / "reason").write_text('{"status": 7}')
    (tmp_path / "stderr").unlink()
    for file in tmp_path.glob("here.*"):
        file.unlink()
    with ranks("leaves", tmp_path, world=2) as job:  # the file of the third stays what it is
        assert job.statuses() == [0, 0]
    assert job.stderr == "" and not directory.exists()
