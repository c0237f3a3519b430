"""What the trainers' tests share: tiny jobs inside test ranks, and what they leave."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from megalign.config import SFTConfig


def token_rows(count: int, *, seed: int = 0, vocabulary: int = 101) -> list[dict[str, list[int]]]:
    """Rows of random tokens of unequal lengths; a random first part of each is not in the loss."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(4, 14)
        prompt = draw.randint(0, length - 2)
        ids = [draw.randrange(3, vocabulary) for _ in range(length)]
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * (length - prompt)})
    return rows


def without_times(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the log without what depends on the clock or the machine."""
    return {
        name: value
        for name, value in line.items()
        if not name.startswith("perf/") and not name.endswith(("time", "per_second"))
    }


def train_sft(
    path: str, rows: list[dict[str, Any]], fields: dict[str, Any], given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains on the calling ranks; what a user would see of it."""
    from megalign.trainers.sft import SFTTrainer

    given = dict(given or {})
    resume = given.pop("resume", None)
    stop = given.pop("stop", None)
    recorder = Recorder()
    callbacks = [recorder] if stop is None else [recorder, stop]
    trainer = SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=rows, callbacks=callbacks, **given)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        output = trainer.train(resume_from_checkpoint=resume)
    return {
        "said": said.getvalue(),
        "history": trainer.state.log_history,
        "output": output,
        "events": recorder.events,
        "epochs": recorder.epochs,
        "digest": digest(fields["output_dir"]),
    }


def sft_fields(**fields: Any) -> dict[str, Any]:
    """A quick deterministic run, unless said otherwise."""
    return {
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        **fields,
    }


class Recorder(TrainerCallback):
    """Notes every event of the protocol by its name."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.epochs: list[float] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.events.append(name)
            if name == "on_step_end":
                self.epochs.append(state.epoch)

        return note


def metric_lines(output_dir: str | Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def digest(directory: str | Path) -> str:
    """Of the exported weights, byte for byte."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class StopAt(TrainerCallback):
    """Ends the run early, as a user's callback may; on one rank only if told so."""

    def __init__(self, step: int, *, only_rank: int | None = None) -> None:
        self.step, self.only_rank = step, only_rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops at the step."""
        if state.global_step == self.step and self.only_rank in (None, args.process_index):
            control.should_training_stop = True
