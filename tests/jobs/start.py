"""Starts jobs the way users do, as processes of their own, and tells how they ended."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from megalign.launch import hold_port

ROOT = Path(__file__).parents[2]
# A launcher's variables must not leak from the tests' own environment into a job.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "SLURM_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    status: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        """What megalign said was wrong, of all ranks."""
        return error_lines(self.stderr)

    @property
    def rank_statuses(self) -> list[int]:
        """Exit statuses of the ranks that torchrun counts as failed."""
        return [int(status) for status in re.findall(r"exitcode\s*: (-?\d+)", self.stderr)]

    def succeeded(self) -> Ended:
        """Itself, with status 0."""
        assert self.status == 0, f"status {self.status}\n{self.stdout}\n{self.stderr}"
        return self


def error_lines(stderr: str) -> list[str]:
    """The lines that begin as ours do."""
    lines = [line for line in stderr.splitlines() if "megalign: error:" in line]
    # Behind a carriage return a progress bar would have been written over it.
    assert all(line.startswith("megalign: error: ") for line in lines), lines
    return lines


def megalign(*words: object) -> list[str]:
    """The command of one rank."""
    return [sys.executable, "-m", "megalign", *map(str, words)]


def torchrun(ranks: int, *command: object, nodes: int = 1) -> list[str]:
    """torchrun with `ranks` ranks on this node, at a port of its own; several nodes meet at the port in {port}."""
    meeting = ["--standalone", "--local_addr", "127.0.0.1"]
    if nodes > 1:
        meeting = ["--nnodes", str(nodes), "--rdzv_backend", "c10d", "--rdzv_id", "job", "--local_addr", "127.0.0.1"]
        meeting += ["--rdzv_endpoint", "127.0.0.1:{port}"]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *meeting, *map(str, command)]


def run(command: Sequence[str], cwd: Path, *, timeout: float = 240, **environ: str) -> Ended:
    """One process (or torchrun and its ranks) from start to end."""
    return run_together([command], cwd, [environ], timeout=timeout)[0]


def run_together(
    commands: Sequence[Sequence[str]],
    cwd: Path,
    environs: Sequence[Mapping[str, str]] | None = None,
    *,
    timeout: float = 240,
) -> list[Ended]:
    """Several processes side by side, which must all be over after `timeout` seconds."""
    with contextlib.ExitStack() as stack:
        port = str(stack.enter_context(hold_port()).getsockname()[1])
        jobs = []
        for command, environ in zip(commands, environs or [{}] * len(commands), strict=True):
            words = [word.replace("{port}", port) for word in command]
            jobs.append(stack.enter_context(_started(words, cwd, environ)))
        end = time.monotonic() + timeout
        return [_ended(*job, end) for job in jobs]


@contextlib.contextmanager
def _started(
    words: list[str], cwd: Path, environ: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], IO[str], IO[str]]]:
    """The process and what it writes; ended with all of its ranks when the test leaves it."""
    # Files, not pipes: nobody empties the pipe of one process while another is waited for.
    with _text_file() as stdout, _text_file() as stderr:
        process = subprocess.Popen(words, cwd=cwd, env=environment(**environ), stdout=stdout, stderr=stderr)
        try:
            yield process, stdout, stderr
        finally:
            end_with_children(process)


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """Whatever it has started, one by one: torchrun gives each rank a session of its own."""
    family: list[psutil.Process | subprocess.Popen[bytes]] = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def signalled_before(command: str, sent: str, place: Path) -> dict[str, str]:
    """The environment of a bash script that gets a signal just before one of its commands, where nobody could aim."""
    aims = place / "aims.sh"
    aims.write_text("""set -T; trap '[[ $BASH_COMMAND != "$AIMED_AT" ]] || kill -s "$SENT" $$' DEBUG\n""")
    return {"BASH_ENV": str(aims), "AIMED_AT": command, "SENT": sent}


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _ended(process: subprocess.Popen[bytes], stdout: IO[str], stderr: IO[str], end: float) -> Ended:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, end - time.monotonic()))
    for file in (stdout, stderr):
        file.seek(0)
    out, err = stdout.read(), stderr.read()
    assert process.returncode is not None, f"not over in time: {process.args}\n{out}\n{err}"
    return Ended(process.returncode, out, err)


def environment(**changes: str) -> dict[str, str]:
    """The environment of a rank: one thread, no hub, this repository's packages wherever it runs.

    What the tests' own PYTHONPATH names follows: it may be another Megatron-Core.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # each rank would compile Megatron anew
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")])),
        **changes,
    }
