"""HfExports: the policy as output_dir/hf-{step}/ every save_hf_steps steps, made beside the training.

The ranks' weights go to disk as a checkpoint of theirs does, by processes beside them; another one beside rank 0 makes
the Hugging Face directory of them. Training waits for the copy to host memory alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from megalign.checkpoints.find import HUGGING_FACE
from megalign.errors import UserError
from megalign.forked import die_with
from megalign.launch import alone
from megalign.parallel.control import agree
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


class HfExports:
    """The exports of one run, one at a time; every method is called on all ranks."""

    def __init__(self, args: Any, groups: ParallelGroups) -> None:
        self._directory, self._world = Path(args.output_dir), groups.world
        self._step: int | None = None  # of the export under way
        self._saving: Saving | None = None
        self._converting: subprocess.Popen[str] | None = None

    def begin(
        self,
        step: int,
        policy: TrainEngine,
        *,
        special_tokens: Mapping[str, int],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Begins the export of the policy as it is now; waits for the one before."""
        self.progress(wait=True)
        self._step = step
        try:
            agree(self._clear, self._world)
            with policy.kept_as_it_was():
                self._saving = policy.begin_save(str(self._weights), special_tokens=special_tokens, weights_only=True)
            agree(partial(self._write_tokenizer, tokenizer), self._world)
        except (OSError, CheckpointException) as error:
            raise self._failure(error) from error

    def progress(self, *, wait: bool = False) -> None:
        """Goes on with what is ready to go on; `wait` brings the export to its end."""
        if self._step is None:
            return
        try:
            if self._saving is not None:
                if self._saving.finish(wait=wait) is None:
                    return
                self._saving = None
                if self._world.rank == 0:
                    self._converting = self._convert()
            if wait:
                agree(self._wait, self._world)
                self._step = None
        except (OSError, CheckpointException) as error:
            raise self._failure(error) from error

    @property
    def _weights(self) -> Path:
        return self._directory / f".hf-{self._step}.weights"

    @property
    def _target(self) -> Path:
        return self._directory / f"hf-{self._step}"

    def _clear(self) -> None:
        """What a killed run left, or one that is being repeated."""
        if self._world.rank == 0:
            for left in (*self._directory.glob(".hf-*"), self._target):
                shutil.rmtree(left, ignore_errors=True)

    def _write_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None and self._world.rank == 0:
            tokenizer.save_pretrained(self._weights / HUGGING_FACE)

    def _convert(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _CONVERT, str(self._weights), str(self._target)],
            env={**os.environ, **alone()},  # what the launcher, torchrun or Slurm, said is of this rank
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(_stand_back, os.getpid()),
        )

    def _wait(self) -> None:
        if self._converting is None:
            return
        _, told = self._converting.communicate()
        status, self._converting = self._converting.returncode, None
        shutil.rmtree(self._weights, ignore_errors=True)
        if status:
            raise OSError(" ".join(told.split())[-500:] or f"its process ended with status {status}")

    def _failure(self, error: BaseException) -> UserError:
        reason = str(error).strip().splitlines()[-1]
        return UserError(f"cannot export {self._target} ({reason}); make room, or leave save_hf_steps out")


def _stand_back(trainer: int) -> None:
    """In the new process: it ends with the rank, and lets it have the processor first."""
    die_with(trainer)
    os.nice(10)
