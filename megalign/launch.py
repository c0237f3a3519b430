"""The job as environment variables that torch.distributed reads, and how a rank joins it. Imports no torch before
it joins.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under `srun` they are made from
Slurm's; a process on its own (a batch script without `srun` too) becomes a job of one rank.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import MutableMapping
from datetime import timedelta

from megalign.errors import UserError

_held: list[socket.socket] = []  # this process's own, until it ends


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> int:
    """Fills in RANK and its companions where nobody has; returns the world size."""
    if "RANK" not in environ:
        environ.update(_slurm(environ) if _in_slurm_step(environ) else alone())
    elif "LOCAL_RANK" not in environ:
        # Whoever sets RANK alone is on one node; megalign.device says so where that cannot be.
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"] if _in_slurm_step(environ) else environ["RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environ.get(name, "").isdigit():
            raise UserError(f"{name}={environ.get(name)!r} must be a whole number; start the job with torchrun or srun")
    world = int(environ["WORLD_SIZE"])
    keep_order(world, environ)
    return world


def keep_order(world: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Kernels of several ranks start in the order in which they were queued, unless the user has said otherwise.

    Megatron hides communication behind a product that is queued after it. A process's first use of CUDA reads this.
    """
    if world > 1:
        environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def join(backend: str, timeout_s: float | None = None) -> None:
    """Joins the job that the environment describes, and returns when every rank has.

    A rank that met an error of its own while another is still connecting would leave that one with gloo's words for
    it, before it has a store to ask who has told what.
    """
    import torch
    import torch.distributed as dist

    from megalign.patches import gloo

    gloo.await_at_exit()
    dist.init_process_group(backend, timeout=None if timeout_s is None else timedelta(seconds=timeout_s))
    # On the CPU: dist.barrier() may take NCCL, which then keeps memory for it.
    dist.all_reduce(torch.zeros(1))


def _in_slurm_step(environ: MutableMapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has SLURM_PROCID and SLURM_NTASKS too, but no step."""
    return all(f"SLURM_{name}" in environ for name in ("PROCID", "LOCALID", "STEP_ID", "STEP_NUM_TASKS"))


def alone() -> dict[str, str]:
    """The variables of a job of one rank; its port is held until another one is asked for."""
    while _held:
        _held.pop().close()
    _held.append(hold_port())
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_held[-1].getsockname()[1]),
    }


def hold_port() -> socket.socket:
    """A socket at a port of this machine that nobody else is given while it is open.

    It is bound, which a port that is only looked up is not when the job's first rank comes to listen at it; and it does
    not listen itself, so that torch.distributed's store may, which allows for that as this socket does.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def _slurm(environ: MutableMapping[str, str]) -> dict[str, str]:
    """A Slurm step's variables in torchrun's names; MASTER_ADDR and MASTER_PORT of the user's own choice
    stay."""
    world = environ["SLURM_STEP_NUM_TASKS"]
    if world == "1":
        return alone()
    found = {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": world,
    }
    if "MASTER_ADDR" not in environ:
        found["MASTER_ADDR"] = _first_host(environ)
    if "MASTER_PORT" not in environ:
        # Two steps of one job, and two jobs on one node, need different ports.
        job, step = (int(re.sub(r"\D", "", environ.get(f"SLURM_{of}_ID", "")) or 0) for of in ("JOB", "STEP"))
        found["MASTER_PORT"] = str(20000 + (job + 101 * step) % 12000)
    return found


def _first_host(environ: MutableMapping[str, str]) -> str:
    """The host of rank 0."""
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES")
    if not hosts or nodes == "1":
        return "127.0.0.1"
    if shutil.which("scontrol"):
        answer = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    return expand_hosts(hosts)[0]


def expand_hosts(hosts: str) -> list[str]:
    """The hosts of a Slurm node list: "a[01-03,7],b" -> a01 a02 a03 a7 b."""
    expanded = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        parts = [_numbers(part[1:-1]) if part[0] == "[" else [part] for part in re.findall(r"\[[^\]]*\]|[^\[]+", entry)]
        expanded += ["".join(choice) for choice in itertools.product(*parts)]
    return expanded


def _numbers(ranges: str) -> list[str]:
    """ "01-03,7" -> 01 02 03 7: zeros in front are part of a host's name."""
    found = []
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        last = last or first
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
