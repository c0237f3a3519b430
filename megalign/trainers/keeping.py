"""Keeper: what of a trainer goes into checkpoints and exports, and comes back from them."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from megalign.checkpoints.find import ENGINE
from megalign.data import prepared
from megalign.trainers import manifest
from megalign.trainers.checkpointing import Checkpoints, LoopState
from megalign.trainers.hf_export import HfExports

if TYPE_CHECKING:
    from megalign.trainers.base import Trainer

# A resumed run must share these fields' values, the rows of an optimizer step, all rows and the models' architectures.
MODEL_FIELDS = ("params_dtype_name", "use_distributed_optimizer")
ROWS_OF_A_STEP = "per_device_train_batch_size x gradient_accumulation_steps x data-parallel ranks"

_STREAM_HINT = (
    "a stream gives as many rows as max_steps takes: keep max_steps with shuffle_dataset; without it max_steps may "
    "grow until these rows are used up"
)


class Keeper:
    """Saves, exports and resumes one trainer; every method is called on all ranks."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._checkpoints = Checkpoints(trainer.args, trainer.groups, trainer.run.say)
        self._exports = HfExports(trainer.args, trainer.groups, lambda: any(trainer.run.stopping.asked()))

    def save(self) -> None:
        """Begins or writes output_dir/checkpoint-{step}."""
        trainer = self._trainer
        run = {"position": trainer.run.position(), "leaf": trainer.loop_state()}
        loop = LoopState(trainer=trainer.state, run=run, replica=trainer.replica_state())
        self._checkpoints.save(trainer.engines(), loop, self._settings(), **self._words())

    def export_if_due(self) -> None:
        """Begins output_dir/hf-{step} at every save_hf_steps-th step, unless a stop comes while another is made."""
        step, every = self._trainer.state.global_step, self._trainer.args.save_hf_steps
        if every is not None and step % every == 0 and self._exports.wait():
            self._exports.begin(step, self._trainer.policy, **self._words())

    def progress(self) -> None:
        """Brings forward what is being written beside the training."""
        self._checkpoints.progress()
        self._exports.progress()

    def end_checkpoint(self) -> None:
        """Brings the checkpoint that is being written to its end."""
        self._checkpoints.progress(wait=True)

    def end_export(self) -> None:
        """The same of the export, which may take minutes; a stop gives it up."""
        run = self._trainer.run
        if run.stopping.cause is None and self._exports.wait():
            return
        left = self._exports.give_up()
        if left is not None:
            run.say(f"{left} was not whole yet, and a stop does not wait: megatron_to_hf.py makes one of a checkpoint")

    def resume(self, resume: str | bool | None) -> None:
        """Puts the trainer where a checkpoint left it; without one a run's metrics.jsonl begins anew."""
        trainer = self._trainer
        trainer.settings()  # a reference is what its files are now, not at the first save
        path = self._checkpoints.find(resume)
        if path is None:
            self._checkpoints.start_run()
            trainer.run.file.start_afresh()
            return
        settings, position = self._settings(), {}
        if (rows := self._first_rows(path)) is not None:
            settings["train_dataset"] = prepared.describe_rows(rows)
            position = {"epoch": 0, "update": manifest.manifest_of(path)["step"]}  # they are an epoch no more
        hints = {"train_dataset": _STREAM_HINT} if trainer.streams else {}
        resumed = self._checkpoints.load(path, trainer.engines(), settings, hints)
        trainer.run.resume(resumed.trainer, resumed.run["position"] | position, trainer.plan)
        trainer.restore_loop_state(resumed.run["leaf"], resumed.replicas)
        if trainer.state.global_step < trainer.plan.max_steps:
            self._checkpoints.note_run()
            trainer.run.file.go_on_after(trainer.state.global_step, logged_step=trainer.run.logged_step)

    def has_model(self) -> bool:
        """Whether output_dir has the model of the checkpoint that was resumed from, written to its end."""
        return self._checkpoints.has_model(self._trainer.model_directories)

    def write_model(self) -> None:
        """The model into output_dir; run.json tells whether it came to its end, and of which step it is."""
        self._checkpoints.note_run()
        self._trainer.save_model()
        self._checkpoints.note_model(self._trainer.state.global_step)

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint."""
        trainer = self._trainer
        return {
            "trainer": type(trainer).__name__,
            **{name: getattr(trainer.args, name) for name in (*MODEL_FIELDS, *trainer.data_fields)},
            ROWS_OF_A_STEP: trainer.rows_per_step,
            **{
                "model" if name == ENGINE else name: engine.architecture.in_json()
                for name, engine in trainer.engines().items()
            },
            "train_dataset": self._described_rows,
            **trainer.settings(),
        }

    @cached_property
    def _described_rows(self) -> str:
        """They are read through once, not at every checkpoint."""
        return prepared.describe_rows(self._trainer.described_rows())

    def _first_rows(self, path: Path) -> Dataset | None:
        """Those that the checkpoint's run, a shorter one, had read of a stream, where it had not used them up.

        A stream gives as many rows as max_steps takes. The order of shuffled ones depends on how many they are.
        """
        trainer, then = self._trainer, manifest.manifest_of(path)
        rows, described = trainer.described_rows(), str(then["settings"].get("train_dataset"))
        count = re.match(r"(\d+) rows ", described)
        is_longer = count is not None and trainer.rows_of(then["step"]) <= int(count[1]) < len(rows)
        if count is None or not is_longer or not trainer.streams or trainer.args.shuffle_dataset:
            return None
        return rows.select(range(int(count[1])))

    def _words(self) -> dict[str, Any]:
        """The tokenizer's part of a model's files; the tokenizer itself where the model directory's is another."""
        trainer = self._trainer
        tokenizer = trainer.processing_class if trainer.changes_tokenizer() else None
        return {"special_tokens": trainer.special_tokens, "tokenizer": tokenizer}
