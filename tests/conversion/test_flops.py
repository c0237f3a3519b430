"""Operations counted from the numbers of a model against those that torch counts while transformers runs it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalign.conversion.families import architecture_of
from megalign.conversion.flops import forward_flops, training_flops
from megalign.conversion.hf_files import read_config
from tests.tiny import TinyModels, load_reference

LENGTH = 12


def counted(path: str, *, backward: bool) -> float:
    """By torch, of one sequence; the tiny models' attention is written out, over all pairs of tokens."""
    model = load_reference(path)
    model.set_experts_implementation("eager")  # torch does not count a grouped product
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(3, 3 + LENGTH)[None]).logits
        if backward:
            logits.sum().backward()
    return float(counter.get_total_flops())


def unseen_pairs(path: str) -> float:
    """What written-out attention computes of pairs that the mask hides."""
    architecture = architecture_of(read_config(path))
    heads = architecture.query_size if architecture.mla is None else None
    size = 2 * heads if heads else architecture.mla.query_size + architecture.mla.value_size
    total = 0
    for layer in range(architecture.num_layers):
        window = architecture.window(layer) or LENGTH
        seen = sum(min(token + 1, window) for token in range(LENGTH))
        total += 2 * size * (LENGTH * LENGTH - seen)
    return total


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "glm4", "qwen2_moe", "mixtral", "deepseek_v3"])
def test_the_products_of_a_forward_pass(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models[family]
    mine = forward_flops(architecture_of(read_config(path)), [LENGTH], LENGTH) + unseen_pairs(path)
    # Rotary angles are a small product there, the shared expert's gate another.
    assert mine == pytest.approx(counted(path, backward=False), rel=0.01)


def test_the_backward_pass_is_two_more(tiny_models: TinyModels) -> None:
    path = tiny_models["qwen3"]
    mine = training_flops(architecture_of(read_config(path)), [LENGTH], LENGTH) + 3 * unseen_pairs(path)
    assert mine == pytest.approx(counted(path, backward=True), rel=0.01)


def test_sequences_do_not_see_each_other_and_the_head_is_for_predicted_tokens(tiny_models: TinyModels) -> None:
    architecture = architecture_of(read_config(tiny_models["llama"]))
    one, two = forward_flops(architecture, [LENGTH], 0), forward_flops(architecture, [LENGTH, LENGTH], 0)
    assert two == 2 * one < forward_flops(architecture, [2 * LENGTH], 0)
    head = 2 * architecture.hidden_size * architecture.vocab_size
    assert forward_flops(architecture, [LENGTH], 5) - one == 5 * head
