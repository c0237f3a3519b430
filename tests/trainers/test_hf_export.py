"""save_hf_steps: the policy of the very step, whole or not there, beside a training that goes on as if it were not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.trainers import hf_export
from megalign.trainers.sft import SFTTrainer
from tests.ranks import run_ranks
from tests.trainers.grpo_runs import save_model_with_tokenizer
from tests.trainers.runs import sft_fields, token_rows, train_sft

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
    beside = run_ranks(2, _train_under_srun, model, {**whole, "max_steps": 5, "save_hf_steps": 2})[0]
    assert beside["digest"] == plain["digest"]
    exports = sorted(path.name for path in (tmp_path / "whole").glob("*hf-*"))
    assert exports == ["hf-2", "hf-4"]
    wanted, found = (load_file(path / "model.safetensors") for path in (tmp_path / "short", tmp_path / "whole/hf-2"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole/hf-2").config.eos_token_id == 2
    files = {path.name for path in (tmp_path / "short").iterdir() if path.is_file()} - {"metrics.jsonl"}
    assert {path.name for path in (tmp_path / "whole/hf-2").iterdir()} == files
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        first, second = ((tmp_path / path / name) for path in ("short", "whole/hf-2"))
        assert json.loads(first.read_text()) == json.loads(second.read_text())


def _fails(model: str, fields: dict[str, Any]) -> str:
    real, hf_export._CONVERT = hf_export._CONVERT, "import sys; sys.exit('No space left')"
    try:
        SFTTrainer(model, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS).train()
    except UserError as error:
        return str(error)
    finally:
        hf_export._CONVERT = real
    return "no error"


def test_an_export_that_fails_is_every_ranks_sentence(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 4, "save_hf_steps": 2, "tensor_model_parallel_size": 2}
    for error in run_ranks(2, _fails, model, fields):
        assert error == f"cannot export {tmp_path}/hf-2 (No space left); make room, or leave save_hf_steps out"
    assert not (tmp_path / "hf-2").exists()
