"""Hugging Face -> torch_dist -> Hugging Face, bitwise for every family, and what goes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megalign.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megalign.checkpoints.reader import TorchDistReader
from megalign.conversion.hf_files import read_config
from tests.checkpoints.models import Converted, bits_of
from tests.jobs.inputs import save_model
from tests.tiny import CONFIGS, save_tiny_classifier, save_tiny_model


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_family_comes_back_bitwise(family: str, converted: Converted, tmp_path: Path) -> None:
    model, checkpoint = converted[family]
    megatron_to_hf(checkpoint, tmp_path / "back", max_shard_size="30KB")
    assert bits_of(tmp_path / "back") == bits_of(model)
    # The layers behind the last are in neither.
    behind = {"num_nextn_predict_layers": 0} if family == "deepseek_v3" else {}
    assert read_config(tmp_path / "back") == read_config(model) | behind
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    files = {name: file for file in tmp_path.glob("back/*.safetensors") for name in load_file(file)}
    assert {name: tmp_path / "back" / file for name, file in index["weight_map"].items()} == files


def test_a_reward_model_comes_back(tmp_path: Path) -> None:
    model = save_tiny_classifier("qwen2", tmp_path / "model")
    hf_to_megatron(Path(model), tmp_path / "megatron")
    assert TorchDistReader(tmp_path / "megatron").shape("output_layer.weight") == (1, 32)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert bits_of(tmp_path / "back") == bits_of(model)


def test_files_are_no_larger_than_asked_unless_one_tensor_is(converted: Converted, tmp_path: Path) -> None:
    megatron_to_hf(converted["mistral"][1], tmp_path / "back", max_shard_size="10KB")
    tensors = [load_file(file) for file in tmp_path.glob("back/*.safetensors")]
    assert all(sum(t.nbytes for t in of_file.values()) <= 10_000 or len(of_file) == 1 for of_file in tensors)
    assert len(tensors) < len(bits_of(converted["mistral"][0]))


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_dtype_is_of_all_but_the_selection_bias(direction: str, tmp_path: Path) -> None:
    model = save_tiny_model("deepseek_v3", tmp_path / "model")
    there, back = (torch.bfloat16, None) if direction == "there" else (None, torch.bfloat16)
    hf_to_megatron(Path(model), tmp_path / "megatron", there)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=back)
    source, found = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    for name, tensor in source.items():
        wanted = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        assert found[name].dtype is wanted.dtype and torch.equal(found[name], wanted), name
    assert read_config(tmp_path / "back")["dtype"] == "bfloat16"


def test_generation_config_and_tokenizer_go_along(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    hf_to_megatron(Path(model), tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    names = {file.name for file in Path(model).iterdir()}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {file.name for file in (tmp_path / "back").iterdir()} >= names
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (Path(model) / "tokenizer.json").read_bytes()


def test_an_embedding_larger_than_a_chunk_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalign.checkpoints.to_megatron._MAX_CHUNK_BYTES", 1000)
    for family in ("llama", "gpt_oss"):  # the second's experts are turned, gate and up by turns
        model = save_tiny_model(family, tmp_path / family)
        hf_to_megatron(Path(model), tmp_path / f"{family}-megatron")
        assert TorchDistReader(tmp_path / f"{family}-megatron").num_chunks("embedding.word_embeddings.weight") == 15
        megatron_to_hf(tmp_path / f"{family}-megatron", tmp_path / f"{family}-back")
        assert bits_of(tmp_path / f"{family}-back") == bits_of(model)
