"""Checkpoints that are written while training goes on, writing that fails, and what is written twice."""

from __future__ import annotations

import json
import resource
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from megalign.checkpoints.checksums import checksum_of
from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.forked import Result
from megalign.model import checkpoint
from megalign.parallel.groups import initialize
from megalign.trainers.checkpointing import Checkpoints, LoopState
from megalign.trainers.manifest import whole_checkpoints
from megalign.trainers.sft import SFTTrainer
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model
from tests.trainers.runs import sft_fields, token_rows

ROWS = token_rows(14)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


class _LetsGo(TrainerCallback):
    """Lets the writers go on after step 4, and notes which checkpoints are whole after each step."""

    def __init__(self, gate: Path) -> None:
        self.gate, self.whole = gate, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each step."""
        self.whole[state.global_step] = [path.name for path in whole_checkpoints(args.output_dir)]
        if state.global_step == 4:
            self.gate.touch()


def _train_beside_a_slow_disk(model: str, fields: dict[str, Any], gate: str) -> tuple[dict[int, list[str]], int]:
    real = checkpoint._write

    def write(*args: Any) -> None:
        while not Path(gate).exists():
            time.sleep(0.01)
        real(*args)

    checkpoint._write = write
    callback = _LetsGo(Path(gate))
    try:
        trainer = SFTTrainer(model, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS, callbacks=[callback])
        trainer.train()
    finally:
        checkpoint._write = real
    return callback.whole, trainer.state.global_step


def test_training_goes_on_while_a_checkpoint_is_written(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path / "out"), "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    fields |= {"async_save": True, "tensor_model_parallel_size": 2, "save_total_limit": 2}
    for whole, last_step in run_ranks(2, _train_beside_a_slow_disk, model, fields, str(tmp_path / "gate")):
        # The second save waits for the first, the end of the run for the last.
        assert whole[2] == whole[3] == whole[4] == []
        assert whole[5] == ["checkpoint-2"]
        assert last_step == 6
    assert [path.name for path in whole_checkpoints(tmp_path / "out")] == ["checkpoint-4", "checkpoint-6"]


class _SavedSlowly:
    """An engine of one file, which a forked process writes when the gate is open."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def kept_as_it_was(self) -> AbstractContextManager[None]:
        """Has no weights to wake."""
        return nullcontext()

    def begin_save(self, path: str, *, special_tokens: Any) -> checkpoint.Saving:
        """As checkpoint.begin_save's."""
        checksums = Result()

        def write() -> None:
            while not self.gate.exists():
                time.sleep(0.01)
            Path(path).mkdir()
            (Path(path) / "__0_0.distcp").write_bytes(b"numbers")
            checksums.put({"__0_0.distcp": checksum_of(b"numbers")})

        return checkpoint.Saving(AsyncRequest(write, (), []), checksums)

    def load(self, path: str) -> None:
        """Has nothing to load."""


class _OnAFullDisk(_SavedSlowly):
    def begin_save(self, path: str, *, special_tokens: Any) -> checkpoint.Saving:
        """Fails."""
        raise OSError(28, "No space left on device")


def _save_two_engines(output_dir: str) -> list[list[str]]:
    args = SFTConfig(output_dir=output_dir, bf16=False, async_save=True)
    checkpoints = Checkpoints(args, initialize(args), print)
    policy, critic = (_SavedSlowly(Path(output_dir) / f"{name} may go on") for name in ("policy", "critic"))
    loop = LoopState(trainer=TrainerState(global_step=1), run={}, replica=None)
    checkpoints.save({"engine": policy, "critic": critic}, loop, {}, special_tokens={}, tokenizer=None)
    found = []
    for gate, patience in ((policy.gate, 0.5), (critic.gate, 10.0)):
        gate.touch()
        end = time.monotonic() + patience
        while time.monotonic() < end and not whole_checkpoints(output_dir):
            time.sleep(0.02)
            checkpoints.progress()
        found.append([path.name for path in whole_checkpoints(output_dir)])
    return found


def test_a_checkpoint_of_two_engines_is_whole_when_the_second_is_written(tmp_path: Path) -> None:
    (whole,) = run_ranks(1, _save_two_engines, str(tmp_path))
    assert whole == [[], ["checkpoint-1"]]
    files = json.loads((tmp_path / "checkpoint-1/manifest.json").read_text())["files"]
    assert {"engine/__0_0.distcp", "critic/__0_0.distcp"} < files.keys()


def _save_one_step_again_and_again(output_dir: str) -> dict[str, Any]:
    args = SFTConfig(output_dir=output_dir, bf16=False, async_save=True)
    path, engine = Path(output_dir) / "checkpoint-1", _SavedSlowly(Path(output_dir))
    groups = initialize(args)
    found: dict[str, Any] = {"identities": [], "whole": []}

    def save(checkpoints: Checkpoints, engine: _SavedSlowly, loop: LoopState) -> None:
        checkpoints.save({"engine": engine}, loop, {}, special_tokens={}, tokenizer=None)
        checkpoints.progress(wait=True)

    def note() -> None:
        found["whole"].append([path.name for path in whole_checkpoints(output_dir)])

    checkpoints = Checkpoints(args, groups, lambda text: None)
    first = LoopState(trainer=TrainerState(global_step=1), run={"epoch": 0}, replica=[torch.arange(3)])
    for _ in range(2):
        save(checkpoints, engine, first)
        found["identities"].append(path.stat().st_ino)
    checkpoints = Checkpoints(args, groups, lambda text: None)
    resumed = checkpoints.load(path, {"engine": engine}, {})
    save(checkpoints, engine, LoopState(trainer=resumed.trainer, run=resumed.run, replica=resumed.replicas[0]))
    found["identities"].append(path.stat().st_ino)
    note()
    second = replace(first, run={"epoch": 1})
    try:
        save(checkpoints, _OnAFullDisk(Path(output_dir)), second)
    except UserError as error:
        found["error"] = str(error)
    note()
    for _ in range(2):  # as by a run that goes on from there, which is interrupted too
        save(Checkpoints(args, groups, lambda text: None), engine, second)
        note()
        path.rename(path.with_suffix(".old"))
        note()
    found["left"] = sorted(path.name for path in Path(output_dir).iterdir())
    return found


def test_a_whole_checkpoint_stays_until_another_of_its_step_is_whole(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _save_one_step_again_and_again, str(tmp_path))
    assert len(set(found["identities"])) == 1, "what is there already is not written again"
    assert "No space left on device" in found["error"]
    one, aside = ["checkpoint-1"], ["checkpoint-1.old"]
    assert found["whole"] == [one, aside, one, aside, one, aside]
    assert found["left"] == aside
    assert torch.load(tmp_path / "checkpoint-1.old/loop/run.pt") == {"epoch": 1}


def _train_on_a_full_disk(model: str, fields: dict[str, Any], limit: int) -> str:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = SFTTrainer(model, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # what does not fit fails as on a full disk
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error"


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_a_full_disk_is_one_sentence_and_leaves_the_older_checkpoint(
    in_background: bool, model: str, tmp_path: Path
) -> None:
    fields = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    fields |= {"tensor_model_parallel_size": 2, "async_save": in_background}
    run_ranks(2, _train_on_a_full_disk, model, {**fields, "max_steps": 2}, resource.RLIM_INFINITY)
    fields |= {"max_steps": 4, "resume_from_checkpoint": "latest"}
    for error in run_ranks(2, _train_on_a_full_disk, model, fields, 4096):
        assert error.startswith(f"cannot write the checkpoint {tmp_path}/checkpoint-4 (")
        assert "File too large" in error and error.endswith("; make room or choose another output_dir")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2"]
