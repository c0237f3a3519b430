"""The job's one error line and its exit status: who prints it, and how the other ranks leave. Imports no torch."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import sys
from types import TracebackType
from typing import NoReturn

from megalign import liveness
from megalign.errors import UserError
from megalign.liveness.launcher import path_of_launcher

EXIT_USER_ERROR = 2
_PATIENCE = 30.0  # seconds in which the store of several torchrun agents must answer


def report_error(message: str) -> None:
    """Prints `megalign: error: message` on one line, once in the whole job, whichever ranks meet the error."""
    _outlast_launcher()
    if _claim_error():
        line = " ".join(message.split())
        # Once the job runs, the cursor may stand behind a progress bar, of this rank or of another.
        start = "" if default_store() is None else "\n"
        print(f"{start}megalign: error: {line}", file=sys.stderr, flush=True)
        # Only whoever has spoken ends the others: one that has the word may not have used it yet.
        liveness.end_job(EXIT_USER_ERROR)


def _outlast_launcher() -> None:
    """A rank that leaves first makes torchrun end this one, perhaps between its claim and its line."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache  # each trainer of a script asks for it, and hooks nest
def report_uncaught() -> None:
    """Makes a UserError that a script does not catch end it as it ends the command line: one line, status 2."""
    previous = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if hasattr(sys, "ps1"):  # a prompt goes on after an error
            previous(kind, error, trace)
        elif isinstance(error, UserError):
            # torch.distributed's own hook, which calls this one, would keep the line for later.
            sys.stderr = sys.__stderr__
            let_a_death_be_told(error)
            report_error(str(error))
            end_at_once(EXIT_USER_ERROR)
        elif is_echo(error):
            end_at_once(EXIT_USER_ERROR)
        else:
            previous(kind, error, trace)

    sys.excepthook = report


def let_a_death_be_told(error: BaseException) -> None:
    """Does not return if a peer's death is what a UserError was made of: of a checkpoint that was cut short, say."""
    cause = error.__cause__ or error.__context__
    # torch.distributed.checkpoint's errors are RuntimeErrors of other ranks in a wrapper that is no Exception.
    if cause is not None and (isinstance(cause, RuntimeError) or not isinstance(cause, Exception)):
        _outlast_launcher()
        liveness.await_verdict()


def end_at_once(status: int) -> NoReturn:
    """Ends the process without waiting for threads: those of NCCL or vLLM could hold it for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    liveness.leave()
    os._exit(status)


def is_echo(error: BaseException) -> bool:
    """Whether a failed collective only follows from an error that another rank has reported; or from its death, and
    then this does not return."""
    if not isinstance(error, RuntimeError):
        return False
    _outlast_launcher()
    liveness.await_verdict()
    return another_rank_reported()


def another_rank_reported() -> bool:
    """Whether the job ends for an error that another rank has told of."""
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
    rank = os.environ.get("RANK", "0")
    with path_of_launcher(".error").open("a+") as file:
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
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_PATIENCE))
        return store.add(f"megalign/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except RuntimeError:
        # The store's host, the first node's agent, has left; what made it leave is its own to report.
        return False
