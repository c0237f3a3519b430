"""Checkpoints and memory of a TrainEngine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from megalign import device
from megalign.algos.supervised import sft_loss
from megalign.train_engine import TrainEngine
from tests.by_hand import random_batch
from tests.layouts import LAYOUTS, ONE_RANK, Layout, arguments, groups_of, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels, save_tiny_model

pytestmark = pytest.mark.megatron


def train(engine: TrainEngine, steps: range) -> list[tuple[float, float]]:
    dp = engine.groups.dp
    results = [engine.train_step([random_batch(10 * i + dp.rank)], sft_loss, learning_rate=1e-3) for i in steps]
    return [(result.loss, result.grad_norm) for result in results]


def weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.gathered()}


def resumed(path: str, layout: Layout, directory: str, fields: dict[str, Any]) -> bool:
    engine = make_engine(path, layout, **fields)
    train(engine, range(3))
    engine.save(directory)
    wanted, final = train(engine, range(3, 6)), weights(engine)
    other = make_engine(path, layout, **fields)
    other.load(directory)
    found = train(other, range(3, 6))
    assert found == wanted, (found, wanted)
    return all(torch.equal(tensor, final[name]) for name, tensor in weights(other).items())


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"use_distributed_optimizer": False}], ids=str)
@pytest.mark.parametrize("layout", [ONE_RANK, *LAYOUTS], ids=str)
def test_a_resumed_engine_goes_on_bitwise(
    tiny_models: TinyModels, tmp_path: Path, layout: Layout, fields: dict[str, Any]
) -> None:
    path = tiny_models["qwen2"]
    assert all(run_ranks(layout.world, resumed, path, layout, str(tmp_path / "checkpoint"), fields))


def test_a_resumed_engine_with_a_tied_embedding_goes_on_bitwise(tiny_models: TinyModels, tmp_path: Path) -> None:
    # Under pipeline parallelism the embedding has a bucket of its own, with a gap before the next one.
    path, layout = tiny_models["llama"], Layout(pp=2)
    assert all(run_ranks(layout.world, resumed, path, layout, str(tmp_path / "checkpoint"), {}))


def slept(path: str, layout: Layout) -> tuple[int, int, int, int]:
    config = arguments(layout)
    type(config).engines_sleep = property(lambda _: True)
    engine = TrainEngine(path, config, groups_of(layout))
    del type(config).engines_sleep
    first = train(engine, range(1))
    del first
    before_weights = weights(engine)
    size = sum(p.numel() * p.element_size() for p in engine._models[0].parameters())
    awake = device.resident_bytes()
    engine.sleep()
    asleep = device.resident_bytes()
    engine.sleep()  # twice is once
    engine.wake()
    again = device.resident_bytes()
    assert all(torch.equal(tensor, before_weights[name]) for name, tensor in weights(engine).items())
    control = TrainEngine(path, arguments(layout), groups_of(layout))
    train(control, range(1))
    assert train(engine, range(1, 3)) == train(control, range(1, 3)), "optimizer state came back changed"
    return size, awake, asleep, again


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(pp=2)], ids=str)
def test_a_sleeping_engine_gives_its_memory_back_and_wakes_bitwise(tmp_path: Path, layout: Layout) -> None:
    config = LlamaConfig(
        vocab_size=101, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for size, awake, asleep, again in run_ranks(layout.world, slept, str(tmp_path), layout, fresh=True):
        held = 4 * size // layout.dp  # weights, gradients and two moments, fp32 each
        assert awake - asleep > 0.9 * held, (size, awake, asleep)
        assert again - asleep > 0.9 * held, (size, asleep, again)


def saved(path: str, layout: Layout, directory: str) -> None:
    make_engine(path, layout, trainable=False).save(directory)


def loaded(path: str, layout: Layout, directory: str) -> dict[str, torch.Tensor]:
    engine = make_engine(path, layout, trainable=False)
    engine.load(directory)
    return weights(engine)


@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_norms_behind_the_parts_and_fused_tensors_are_read_at_another_layout(tmp_path: Path, family: str) -> None:
    path, other = (save_tiny_model(family, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    run_ranks(2, saved, path, Layout(tp=2, sp=True), str(tmp_path / "checkpoint"))
    wanted = load_file(f"{path}/model.safetensors")
    for found in run_ranks(2, loaded, other, Layout(pp=2), str(tmp_path / "checkpoint")):
        assert sorted(found) == sorted(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
