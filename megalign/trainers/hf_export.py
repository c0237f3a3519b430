"""HfExports: the policy as output_dir/hf-{step}/ every save_hf_steps steps, made beside the training.

The ranks' weights go to disk as a checkpoint of theirs does, by processes beside them; another one beside rank 0 makes
the Hugging Face directory of them. Training waits for the copy to host memory, and for an export that is still being
made when the next is due; the run's end waits for the last. A stop waits for none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from megalign.checkpoints.find import HUGGING_FACE
from megalign.errors import UserError
from megalign.forked import die_with
from megalign.launch import alone
from megalign.parallel.control import agree, any_rank, from_first
from megalign.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from megalign.model.checkpoint import Saving
    from megalign.train_engine import TrainEngine

_CONVERT = """
import sys
from pathlib import Path
from megalign.checkpoints.convert import megatron_to_hf
from megalign.failure import report_uncaught
report_uncaught()
megatron_to_hf(Path(sys.argv[1]), Path(sys.argv[2]))
"""
_LOOK = 1.0  # seconds, of which the watch sees some


class HfExports:
    """The exports of one run, one at a time; every method is called on all ranks."""

    def __init__(self, args: Any, groups: ParallelGroups, is_stop_asked: Callable[[], bool]) -> None:
        self._directory, self._world = Path(args.output_dir), groups.world
        self._is_stop_asked = is_stop_asked
        self._step: int | None = None  # of the export under way
        self._saving: Saving | None = None
        self._converting: subprocess.Popen[bytes] | None = None  # rank 0's
        self._told: IO[bytes] | None = None  # its stderr: a pipe would fill up while nobody reads

    def begin(
        self,
        step: int,
        policy: TrainEngine,
        *,
        special_tokens: Mapping[str, int],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Begins the export of the policy as it is now; the one before is at its end."""
        assert self._step is None, f"hf-{self._step} is still being made"
        self._step = step
        with self._failing():
            agree(self._clear, self._world)
            with policy.kept_as_it_was():
                self._saving = policy.begin_save(str(self._weights), special_tokens=special_tokens, weights_only=True)
            agree(partial(self._write_tokenizer, tokenizer), self._world)

    def progress(self) -> None:
        """Goes on with what is ready to go on; a failure is every rank's."""
        if self._step is not None:
            with self._failing():
                self._is_made(0.0)

    def wait(self) -> bool:
        """Brings the export to its end, unless a stop is asked for meanwhile; whether it came there."""
        if self._step is None:
            return True
        with self._failing():
            # Two places in turn: the watch takes a thread that it always finds in one for one that hangs.
            while not (self._is_over() or self._is_over()):
                pass
        return self._step is None

    def give_up(self) -> Path | None:
        """Ends and removes what is being made; on rank 0 its name, unless it had become whole."""
        if self._step is None:
            return None
        if self._converting is not None:
            self._converting.kill()
            self._converting.wait()
        if self._saving is not None:
            with suppress(OSError, CheckpointException):  # nobody needs them any more
                self._saving.finish(wait=True)
        target = self._target
        if self._world.rank == 0:
            _remove(self._directory.glob(f".{target.name}.*"))
        self._step = self._saving = self._converting = self._told = None
        return None if target.is_dir() else target

    def _is_over(self) -> bool:
        return self._is_made(_LOOK) or any_rank([self._is_stop_asked()], self._world)[0]

    def _is_made(self, seconds: float) -> bool:
        """Whether the directory is there, or comes within some seconds; begins it when the weights are on the disk."""
        if self._saving is not None:
            if self._saving.finish(wait=False) is None:
                time.sleep(min(seconds, 0.1))
                return False
            self._saving = None
            agree(self._convert, self._world)
        if from_first(partial(self._look, seconds), self._world):
            self._step = None
        return self._step is None

    @property
    def _weights(self) -> Path:
        return self._directory / f".hf-{self._step}.weights"

    @property
    def _target(self) -> Path:
        return self._directory / f"hf-{self._step}"

    def _clear(self) -> None:
        """What a killed run left, or one that is being repeated."""
        if self._world.rank == 0:
            _remove([*self._directory.glob(".hf-*"), self._target])

    def _write_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None and self._world.rank == 0:
            tokenizer.save_pretrained(self._weights / HUGGING_FACE)

    def _convert(self) -> None:
        if self._world.rank:
            return
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 (closed when nobody holds it)
        self._converting = subprocess.Popen(
            [sys.executable, "-c", _CONVERT, str(self._weights), str(self._target)],
            env={**os.environ, **alone()},  # what the launcher, torchrun or Slurm, said is of this rank
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._told,
            preexec_fn=partial(_stand_back, os.getpid()),
        )

    def _look(self, seconds: float) -> bool:
        assert self._converting is not None and self._told is not None
        try:
            status = self._converting.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._told.seek(0)
        told = self._told.read().decode(errors="replace")
        self._converting = self._told = None
        shutil.rmtree(self._weights, ignore_errors=True)
        if status:
            raise OSError(" ".join(told.split())[-500:] or f"its process ended with status {status}")
        return True

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turns a full disk and the like into a UserError."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"cannot export {self._target} ({reason}); make room, or leave save_hf_steps out"
            ) from error


def _remove(left: Iterable[Path]) -> None:
    """Directories, and the lock of a conversion that was killed."""
    for path in left:
        if path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _stand_back(trainer: int) -> None:
    """In the new process: it ends with the rank, and lets it have the processor first."""
    die_with(trainer)
    os.nice(10)
