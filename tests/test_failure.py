"""The one error line of a job, whoever meets the error, and what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megalign import cli, failure
from megalign.launch import hold_port
from tests.jobs.start import environment, error_lines, run, run_together, torchrun

REPORT = "import sys; from megalign.failure import report_error; report_error('wrong\\n  twice'); sys.exit(2)"
WRONG_FLAG = ("-m", "megalign", "sft", "--learning_rte", "1")
WRONG_FLAG_LINE = "megalign: error: learning_rte is not a field of SFTConfig; did you mean learning_rate?"


def report_on_ranks(tmp: Path, ranks: tuple[int, ...]) -> list[str]:
    """What the ranks of one launcher, which is this process, say; they start in this order, side by side."""
    shared = environment(WORLD_SIZE=str(len(ranks)), TMPDIR=str(tmp))
    command = [sys.executable, "-c", REPORT]
    jobs = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE) for rank in ranks]
    return [job.communicate(timeout=60)[1].decode() for job in jobs]


def test_ranks_of_one_launcher_report_once(tmp_path: Path) -> None:
    lines = report_on_ranks(tmp_path, (3, 2, 1, 0))
    assert sorted(lines) == ["", "", "", "megalign: error: wrong twice\n"]


def test_a_failed_job_removes_the_files_of_launchers_that_are_gone(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, elsewhere = (f"megalign-{os.getuid()}-{namespace}" for namespace in (os.stat("/proc/self/ns/pid").st_ino, 1))
    alive = os.getppid()
    start = Path(f"/proc/{alive}/stat").read_text().rpartition(")")[2].split()[19]
    kept = [f"{here}-{alive}-{start}.error", f"{elsewhere}-{ended.pid}-7.error", "mine.error"]
    kept += [f"{here}-{ended.pid}-0.error"]  # of another user's launcher, which /proc may hide (hidepid)
    gone = [f"{here}-{ended.pid}-7.error", f"{here}-{alive}-{int(start) - 1}.error"]
    for name in kept + gone:
        (tmp_path / name).write_text("0\n")
    for name in (f"{here}-{ended.pid}-7-0.0.ranks", f"{here}-{ended.pid}-0-0.0.ranks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0").write_text("1 1")
    report_on_ranks(tmp_path, (0, 1))
    left = {path.name for path in tmp_path.iterdir()}
    (own,) = left - {*kept, f"{here}-{ended.pid}-0-0.0.ranks"}
    assert len(left) == len(kept) + 2
    assert own.startswith(f"{here}-{os.getpid()}-")


DISTRIBUTED = """
import os, sys, torch.distributed as dist
from megalign import cli, launch
from megalign.errors import UserError
def fail(argv):
    launch.join("gloo")
    if dist.get_rank() == 1:
        raise UserError("row 3 has no column prompt; add it")
    dist.barrier()
cli._run = fail
sys.exit(cli.main([]))
"""


def test_one_ranks_error_ends_the_job_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(DISTRIBUTED)
    ended = run(torchrun(3, "job.py"), tmp_path)
    assert ended.status != 0
    assert ended.error_lines == ["megalign: error: row 3 has no column prompt; add it"]
    assert 'job.py", line' not in ended.stderr and "cli.py" not in ended.stderr


def test_the_line_comes_before_torchruns_own_report(tmp_path: Path) -> None:
    ended = run(torchrun(2, *WRONG_FLAG), tmp_path, TMPDIR=str(tmp_path))
    assert ended.stderr.splitlines()[0] == WRONG_FLAG_LINE == ended.error_lines[0]
    assert len(ended.error_lines) == 1
    # README says both: the ranks end with 2, and torchrun has a status of its own.
    assert set(ended.rank_statuses) <= {2, -15} and 2 in ended.rank_statuses
    assert ended.status == 1 and "ChildFailedError" in ended.stderr


def test_two_agents_report_a_wrong_flag_once(tmp_path: Path) -> None:
    meeting = ["--nnodes=2", "--master_addr=127.0.0.1", "--master_port={port}"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *meeting]
    agents = run_together([[*agent, f"--node_rank={node}", *WRONG_FLAG] for node in (0, 1)], tmp_path)
    assert error_lines("".join(ended.stderr for ended in agents)) == [WRONG_FLAG_LINE]
    assert all(ended.status != 0 for ended in agents)
    assert not any("failure.py" in ended.stderr for ended in agents)


def test_a_rank_whose_first_nodes_agent_has_left_leaves_the_line_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(failure, "_PATIENCE", 0.5)
    monkeypatch.setattr(failure, "_outlast_launcher", lambda: None)  # this process is no rank
    with hold_port() as gone:
        agents = {"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        place = {"RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(gone.getsockname()[1])}
        for name, value in {**agents, **place}.items():
            monkeypatch.setenv(name, value)
        assert cli.main(list(WRONG_FLAG[2:])) == failure.EXIT_USER_ERROR
    assert "megalign: error" not in capfd.readouterr().err


TWICE = """
import sys
from megalign.errors import UserError
from megalign.failure import report_uncaught

report_uncaught()
hook = sys.excepthook
report_uncaught()
print(sys.excepthook is hook)
raise UserError("wrong")
"""


def test_a_script_with_several_trainers_has_one_hook(tmp_path: Path) -> None:
    ended = run([sys.executable, "-c", TWICE], tmp_path)
    assert (ended.status, ended.stdout, ended.stderr) == (2, "True\n", "megalign: error: wrong\n")
