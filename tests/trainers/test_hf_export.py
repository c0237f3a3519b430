"""save_hf_steps: the policy of the very step, whole or not there, beside a training that goes on as if it were not."""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.liveness import pace
from megalign.trainers import hf_export
from megalign.trainers.sft import SFTTrainer
from tests.ranks import run_ranks
from tests.trainers.grpo_runs import save_model_with_tokenizer
from tests.trainers.runs import metric_lines, sft_fields, token_rows, train_sft

ROWS = token_rows(14)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


def _train_under_srun(model: str, fields: dict[str, Any]) -> dict[str, Any]:
    """With what srun sets in every task of a step of two, which is not of the process that makes the directory."""
    rank = os.environ["RANK"]
    of_the_step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    with mock.patch.dict(os.environ, {**of_the_step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}):
        return train_sft(model, ROWS, fields)


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}], ids=str)
def test_an_export_is_the_model_of_its_step(layout: dict[str, int], model: str, tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant", **layout}
    short, whole = ({"output_dir": str(tmp_path / name), **constant} for name in ("short", "whole"))
    run_ranks(2, train_sft, model, ROWS, {**short, "max_steps": 2})
    plain = run_ranks(2, train_sft, model, ROWS, {**whole, "max_steps": 5})[0]
    # The processes beside the training give way to all others of the machine.
    beside = run_ranks(2, _train_under_srun, model, {**whole, "max_steps": 5, "save_hf_steps": 2}, timeout=400)[0]
    assert beside["digest"] == plain["digest"]
    exports = sorted(path.name for path in (tmp_path / "whole").glob("*hf-*"))
    assert exports == ["hf-2", "hf-4"]
    wanted, found = (load_file(path / "model.safetensors") for path in (tmp_path / "short", tmp_path / "whole/hf-2"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole/hf-2").config.eos_token_id == 2
    files = {path.name for path in (tmp_path / "short").iterdir() if path.is_file()} - {"metrics.jsonl", "run.json"}
    assert {path.name for path in (tmp_path / "whole/hf-2").iterdir()} == files
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        first, second = ((tmp_path / path / name) for path in ("short", "whole/hf-2"))
        assert json.loads(first.read_text()) == json.loads(second.read_text())


class _Slowly(TrainerCallback):
    """Gives the process beside the training time to fail."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits once there is one."""
        time.sleep(0.5 if state.global_step > args.save_hf_steps else 0)


def _fails(model: str, fields: dict[str, Any]) -> tuple[str, int]:
    trainer = SFTTrainer(model, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS, callbacks=[_Slowly()])
    with mock.patch.object(hf_export, "_CONVERT", "import sys; sys.exit('No space left')"):
        try:
            trainer.train()
        except UserError as error:
            return str(error), trainer.state.global_step
    return "no error", trainer.state.global_step


def test_an_export_that_fails_is_every_ranks_sentence_as_soon_as_it_does(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 60, "save_hf_steps": 31, "tensor_model_parallel_size": 2}
    for error, step in run_ranks(2, _fails, model, fields, timeout=400):
        assert error == f"cannot export {tmp_path}/hf-31 (No space left); make room, or leave save_hf_steps out"
        assert 31 < step < 60
    assert not (tmp_path / "hf-31").exists()


class _Stop(TrainerCallback):
    """Asks one rank to stop, in the step in which the next export is due."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """By the file."""
        if state.global_step == 3:
            (Path(args.output_dir) / "STOP").touch()


def _stopped(model: str, fields: dict[str, Any]) -> dict[str, Any]:
    partial = str(Path(fields["output_dir"]) / ".hf-2.partial")
    with mock.patch.object(hf_export, "_CONVERT", f"import os, time; os.mkdir({partial!r}); time.sleep(100)"):
        given = {"stop": _Stop(), "eval_dataset": ROWS[:3]}
        return train_sft(model, ROWS, fields, given)


def test_a_stop_waits_for_no_export_and_no_evaluation(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 6, "save_hf_steps": 2, "tensor_model_parallel_size": 2}
    fields |= {"eval_strategy": "steps", "eval_steps": 1}
    said = run_ranks(2, _stopped, model, fields, timeout=60)[0]["said"]
    assert f"megalign: {tmp_path}/hf-2 was not whole yet, and a stop does not wait" in said
    assert "stopped after step 4" in said and (tmp_path / "checkpoint-4/manifest.json").exists()
    assert not list(tmp_path.glob("*hf-*"))
    assert [line["step"] for line in metric_lines(tmp_path) if "eval_loss" in line] == [1, 2, 3]


def test_waiting_for_an_export_is_not_standing_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, places = [0.0], []
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)  # its clock is not this one
    watched = pace.Pace(0.8)
    due, looked = threading.Lock(), threading.Lock()  # in C: a thread that waits for one is in no frame but its own
    due.acquire(), looked.acquire()

    def watch() -> None:
        while due.acquire() and len(places) < 12:
            now[0] += 0.5
            places.append(watched.overdue())
            looked.release()

    def from_first(look: Any, world: Any) -> bool:  # on a rank to which rank 0 tells in the end that it is made
        due.release()
        looked.acquire()
        return len(places) == 12

    monkeypatch.setattr(hf_export, "from_first", from_first)
    monkeypatch.setattr(hf_export, "any_rank", lambda flags, world: flags)
    second = SimpleNamespace(world=SimpleNamespace(rank=1, size=2))
    exports = hf_export.HfExports(SimpleNamespace(output_dir=str(tmp_path)), second, lambda: False)  # type: ignore[arg-type]
    exports._step = 2
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    assert exports.wait()
    due.release()
    watching.join()
    watched.end()
    assert places == [None] * 12
