"""Models with experts: Hugging Face -> Megatron -> Hugging Face is bitwise at the layouts that experts add."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.conversion.hf_files import read_config
from tests.layouts import ONE_RANK, Layout, make_engine
from tests.moe_layouts import MOE_LAYOUTS
from tests.ranks import run_ranks
from tests.resharding.test_round_trip import check_round_trip, marked_models, refusal, save_marked_model
from tests.tiny import MOE_FAMILIES, save_tiny_model

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return marked_models(MOE_FAMILIES, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
def test_hf_to_megatron_to_hf_is_bitwise(models: dict[str, str], tmp_path: Path, layout: Layout) -> None:
    check_round_trip(models, tmp_path, layout)


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, sp=True, etp=2)], ids=str)
def test_a_stack_of_one_expert_is_a_stack(tmp_path: Path, layout: Layout) -> None:
    path = save_marked_model("gpt_oss", tmp_path / "model", num_local_experts=1, num_experts_per_tok=1)
    check_round_trip({"one": path}, tmp_path / "out", layout)


def test_layers_behind_the_last_are_left_out_where_the_config_has_them(tmp_path: Path) -> None:
    for number in (1, 0):
        path = save_tiny_model("deepseek_v3", tmp_path / str(number), num_nextn_predict_layers=number)
        tensors = load_file(f"{path}/model.safetensors")
        tensors["model.layers.4.eh_proj.weight"] = torch.zeros(32, 64)
        save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
        [error] = run_ranks(1, refusal, path)
        assert (error is None) == (number == 1), error
    assert "unexpected tensors: model.layers.4.eh_proj.weight" in error


def exported(path: str, target: str) -> None:
    make_engine(path, ONE_RANK, trainable=False).export(target)


def test_an_exported_config_does_not_promise_the_layers_that_are_left_out(tmp_path: Path) -> None:
    path = save_tiny_model("deepseek_v3", tmp_path / "model", num_nextn_predict_layers=1)
    run_ranks(1, exported, path, str(tmp_path / "out"))
    before, after = read_config(path), read_config(tmp_path / "out")
    assert before["num_nextn_predict_layers"] == 1
    assert after == before | {"num_nextn_predict_layers": 0}
