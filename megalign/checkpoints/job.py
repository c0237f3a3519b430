"""What conversions share: the ranks of a job, an output that appears whole, a progress bar with its speed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megalign import durable, launch
from megalign.errors import UserError
from megalign.output_lock import OutputLock


class Job:
    """The ranks, each of which converts a share; a process of its own is a job of one."""

    def __init__(self) -> None:
        if launch.prepare_environment() > 1 and not dist.is_initialized():
            launch.join("gloo")
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of this rank's items: neighbours, about as many bytes as any other rank's."""
        total, before, mine = sum(sizes), 0, []
        for number, size in enumerate(sizes):
            # By its middle, so that each item is one rank's.
            if (before + size / 2) * self.size // max(total, 1) == self.rank:
                mine.append(number)
            before += size
        return mine

    def first_told(self, mine: str | None) -> str | None:
        """What the first rank has to say that has something to say; a collective."""
        everyone = [mine]
        if self.size > 1:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, mine)
        return next(filter(None, everyone), None)

    @contextmanager
    def output(self, path: Path) -> Iterator[Path]:
        """A directory beside `path` to write in, which becomes `path` when every rank has written; a collective.

        What a killed process leaves has a name that begins with a dot, and the next one removes it.
        """
        partial = path.parent / f".{path.name}.partial"
        with self.claimed(path):
            try:
                if self.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                self.barrier()
                yield partial
                self.barrier()
                if self.rank == 0:
                    durable.sync_tree(partial)
                    durable.rename(partial, path)
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise _cannot_write(path, error) from error
            except UserError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            self.barrier()

    @contextmanager
    def claimed(self, path: Path) -> Iterator[None]:
        """`path` is new, and no other job writes it meanwhile; refused on every rank otherwise. A collective."""
        lock, fault = OutputLock(path, path.parent), None
        try:
            if self.rank == 0:
                fault = _refused(path, lock)
            if (told := self.first_told(fault)) is not None:
                raise UserError(told)
            yield
        finally:
            lock.release()


def _refused(path: Path, lock: OutputLock) -> str | None:
    """Why the directory cannot be written; None: the lock is taken, and nothing is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.take()
        # Not before: another job may have been at its end.
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            kind = " as a link" if path.is_symlink() else ""
            return f"{path} exists already{kind}; choose another directory, or remove it"
        if path.exists():
            path.rmdir()  # an empty one: the new one comes at once, or not
    except UserError as error:
        return str(error)
    except OSError as error:
        return str(_cannot_write(path, error))
    return None


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path} ({error}); make room or choose another directory")


class Meter:
    """Bytes done of bytes to do, shown by rank 0 for its own share."""

    def __init__(self, job: Job, what: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=job.rank != 0)
        self._task = self._progress.add_task(what, total=total)
        self._console, self._shown = self._progress.console, job.rank == 0
        self.done, self._started = 0, time.perf_counter()

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if error is None and self._shown:
            seconds = time.perf_counter() - self._started
            self._console.print(f"{self.done / 1e9:.2f} GB in {seconds:.1f} s: {self.done / 1e9 / seconds:.2f} GB/s")

    def written(self, nbytes: int) -> None:
        """Counts."""
        self.done += nbytes
        self._progress.advance(self._task, nbytes)
