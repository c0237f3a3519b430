"""The job as environment variables that torch.distributed reads, and its one error line. Imports no torch.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under `srun` they are made from
Slurm's; a process on its own (a batch script without `srun` too) becomes a job of one rank.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from types import TracebackType
from typing import NoReturn

from megalign.errors import UserError

EXIT_USER_ERROR = 2


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> int:
    """Fills in RANK and its companions where nobody has; returns the world size."""
    if "RANK" not in environ:
        environ.update(_slurm(environ) if _in_slurm_step(environ) else _alone())
    elif "LOCAL_RANK" not in environ:
        # Whoever sets RANK alone is on one node; megalign.device says so where that cannot be.
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"] if _in_slurm_step(environ) else environ["RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environ.get(name, "").isdigit():
            raise UserError(f"{name}={environ.get(name)!r} must be a whole number; start the job with torchrun or srun")
    return int(environ["WORLD_SIZE"])


def _in_slurm_step(environ: MutableMapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has SLURM_PROCID and SLURM_NTASKS too, but no step."""
    return all(f"SLURM_{name}" in environ for name in ("PROCID", "LOCALID", "STEP_ID", "STEP_NUM_TASKS"))


def _alone() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _slurm(environ: MutableMapping[str, str]) -> dict[str, str]:
    """A Slurm step's variables in torchrun's names; MASTER_ADDR and MASTER_PORT of the user's own choice
    stay."""
    world = environ["SLURM_STEP_NUM_TASKS"]
    if world == "1":
        return _alone()
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


def report_error(message: str) -> None:
    """Prints `megalign: error: message` on one line, once in the whole job, whichever ranks meet the error."""
    # A rank that leaves first makes torchrun end this one, perhaps between its claim and its line.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _claim_error():
        line = " ".join(message.split())
        # Once the job runs, the cursor may stand behind a progress bar, of this rank or of another.
        start = "" if default_store() is None else "\n"
        print(f"{start}megalign: error: {line}", file=sys.stderr, flush=True)


def report_uncaught() -> None:
    """Makes a UserError that a script does not catch end it as it ends the command line: one line, status 2."""
    previous = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if hasattr(sys, "ps1"):  # a prompt goes on after an error
            previous(kind, error, trace)
        elif isinstance(error, UserError):
            # torch.distributed's own hook, which calls this one, would keep the line for later.
            sys.stderr = sys.__stderr__
            report_error(str(error))
            end_at_once(EXIT_USER_ERROR)
        elif isinstance(error, RuntimeError) and another_rank_reported():
            end_at_once(EXIT_USER_ERROR)
        else:
            previous(kind, error, trace)

    sys.excepthook = report


def end_at_once(status: int) -> NoReturn:
    """Ends the process without waiting for threads: those of NCCL or vLLM could hold it for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def another_rank_reported() -> bool:
    """Whether a failed collective is only the echo of an error that another rank has reported."""
    store = default_store()
    if store is None:
        return False
    try:
        return store.check(["megalign/error"])
    except RuntimeError:
        # The store's host has left; what made it leave is its own to report.
        return True


def _claim_error() -> bool:
    """Whether this rank is the first to report. All ranks meet a wrong flag, only one a wrong row."""
    store = default_store()
    if store is not None:
        try:
            return store.add("megalign/error", 1) == 1
        except RuntimeError:
            # The store's host has left; what made it leave is its own to report.
            return False
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    # Not by rank: torchrun ends the others as soon as one has left, rank 0 perhaps before it has spoken.
    if not _first_on_this_node():
        return False
    return _first_node_by_agent() if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else True


def default_store():  # noqa: ANN202  (torch.distributed.Store, of a module that may not be imported)
    """torch.distributed's key-value store when the process group is up; never imports torch."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _first_on_this_node() -> bool:
    """The ranks of a node share the launcher as their parent: a file named after it lists those that came.

    A rank that finds itself there belongs to the next job of the same launcher (a shell, or a restart).
    """
    parent, rank = os.getppid(), os.environ.get("RANK", "0")
    try:
        with open(f"/proc/{parent}/stat") as stat:
            started = stat.read().rpartition(")")[2].split()[19]
    except OSError:
        started = "0"
    path = os.path.join(tempfile.gettempdir(), f"megalign-{os.getuid()}-{parent}-{started}.error")
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        came = file.read().split()
        is_first = not came or rank in came
        if is_first:
            file.truncate(0)
        file.write(f"{rank}\n")
    return is_first


def _first_node_by_agent() -> bool:
    """With several torchrun agents: asks the store that they share."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ.get("GROUP_RANK", "0") == "0"
    from datetime import timedelta

    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
    return store.add(f"megalign/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
