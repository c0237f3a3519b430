"""Slurm's variables as torchrun's."""

from __future__ import annotations

import os
import socket
import stat

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
    assert environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
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
    port = int(environ["MASTER_PORT"])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))  # as if it were given to somebody else before this rank listens at it
    socket.create_server(("127.0.0.1", port)).close()  # which allows for sockets that do not listen, as torch's does


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
