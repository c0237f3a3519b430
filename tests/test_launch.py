"""Slurm's variables as torchrun's, and the one error line of a job."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys

import pytest

from megalign.errors import UserError
from megalign.launch import expand_hosts, prepare_environment

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("a", ["a"]),
        ("a,b-2", ["a", "b-2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("a[01-03,7],b", ["a01", "a02", "a03", "a7", "b"]),
        ("r[1-2]n[08-09].x", ["r1n08.x", "r1n09.x", "r2n08.x", "r2n09.x"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_node_lists_expand(text, hosts):
    assert expand_hosts(text) == hosts


def test_a_slurm_step_becomes_a_job():
    environ = dict(STEP)
    assert prepare_environment(environ) == 8
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("5", "1", "8")
    assert environ["MASTER_ADDR"] == "gpu07"
    assert 1024 < int(environ["MASTER_PORT"]) < 32768
    other = dict(STEP, SLURM_PROCID="0", SLURM_LOCALID="0")
    prepare_environment(other)
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]
    another_step = dict(STEP, SLURM_STEP_ID="1")
    prepare_environment(another_step)
    assert another_step["MASTER_PORT"] != environ["MASTER_PORT"]


def test_scontrol_is_asked_for_the_hosts(tmp_path, monkeypatch):
    command = tmp_path / "scontrol"
    command.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[07-08]" ] && printf "first\\nsecond\\n"\n')
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environ = dict(STEP)
    prepare_environment(environ)
    assert environ["MASTER_ADDR"] == "first"


def test_a_step_on_one_node_needs_no_host_name():
    environ = dict(STEP, SLURM_NNODES="1")
    prepare_environment(environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1"


def test_torchrun_and_the_users_own_master_win():
    environ = dict(STEP, RANK="0", WORLD_SIZE="2")
    assert prepare_environment(environ) == 2 and environ["RANK"] == "0"
    environ = dict(STEP, MASTER_ADDR="me", MASTER_PORT="4000")
    prepare_environment(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("me", "4000")


# What sbatch sets for the script itself: a rank's number, the tasks that srun would start, but no step.
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
STEP_OF_ONE = dict(STEP, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="1")  # srun --ntasks=1 in it


@pytest.mark.parametrize("environ", [{}, BATCH_SCRIPT, STEP_OF_ONE])
def test_one_process_is_a_job_of_one_rank(environ):
    environ = dict(environ)
    assert prepare_environment(environ) == 1
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["MASTER_ADDR"]) == ("0", "0", "127.0.0.1")
    assert int(environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("given", "local_rank"), [({}, "5"), (STEP, "1"), (BATCH_SCRIPT, "5"), ({"LOCAL_RANK": "3"}, "3")]
)
def test_a_rank_without_a_local_rank_gets_one(given, local_rank):
    environ = {**given, "RANK": "5", "WORLD_SIZE": "8"}
    assert prepare_environment(environ) == 8
    assert environ["LOCAL_RANK"] == local_rank


def test_half_a_torchrun_environment_is_refused():
    with pytest.raises(UserError, match="WORLD_SIZE=None"):
        prepare_environment({"RANK": "0"})


REPORT = "import sys; from megalign.launch import report_error; report_error('wrong\\n  twice'); sys.exit(2)"


def test_ranks_of_one_launcher_report_once(tmp_path):
    environ = dict(os.environ, WORLD_SIZE="4", TMPDIR=str(tmp_path))
    ranks = [
        subprocess.Popen([sys.executable, "-c", REPORT], env=dict(environ, RANK=str(rank)), stderr=subprocess.PIPE)
        for rank in (3, 2, 1, 0)
    ]
    lines = [rank.communicate(timeout=60)[1].decode() for rank in ranks]
    assert sorted(lines) == ["", "", "", "megalign: error: wrong twice\n"]


DISTRIBUTED = """
import os, sys, torch.distributed as dist
from megalign import cli
from megalign.errors import UserError
dist.init_process_group("gloo")
def fail(argv):
    if dist.get_rank() == 1:
        raise UserError("row 3 has no column prompt; add it")
    dist.barrier()
cli._run = fail
sys.exit(cli.main([]))
"""


def test_one_ranks_error_ends_the_job_with_one_line(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(DISTRIBUTED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "3",
        "--standalone",
        str(script),
    ]
    environ = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.getcwd())
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    lines = [line for line in ran.stderr.splitlines() if line.startswith("megalign: error:")]
    assert lines == ["megalign: error: row 3 has no column prompt; add it"]
    assert 'job.py", line' not in ran.stderr and "cli.py" not in ran.stderr


def test_two_agents_report_a_wrong_flag_once():
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        command += ["--master_addr=127.0.0.1", f"--master_port={probe.getsockname()[1]}"]
    environ = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.getcwd())
    words = ["-m", "megalign", "sft", "--learning_rte", "1"]
    agents = [
        subprocess.Popen([*command, f"--node_rank={node}", *words], env=environ, stderr=subprocess.PIPE, text=True)
        for node in (0, 1)
    ]
    said = "".join(agent.communicate(timeout=120)[1] for agent in agents)
    assert [line for line in said.splitlines() if line.startswith("megalign: error:")] == [
        "megalign: error: learning_rte is not a field of SFTConfig; did you mean learning_rate?"
    ]
    assert all(agent.returncode != 0 for agent in agents)
