"""Per-token logprobs of packed batches equal transformers', for every family, layout and packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import EIGHT_RANKS, EVERYTHING, LAYOUTS, ONE_RANK, Layout
from tests.parity import largest_difference
from tests.tiny import DENSE_FAMILIES, TinyModels, save_tiny_model

pytestmark = pytest.mark.megatron

PACKINGS = [[[4], [5, 0], [2, 3, 1]], [[5, 4, 3, 2, 1, 0], [0]]]


# The layout is the outer loop: its process groups are made once for all families.
@pytest.mark.parametrize("family", DENSE_FAMILIES)
@pytest.mark.parametrize("layout", [ONE_RANK, *LAYOUTS], ids=str)
def test_logprobs_equal_transformers(tiny_models: TinyModels, family: str, layout: Layout) -> None:
    assert largest_difference(tiny_models[family], layout) < 1e-4


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                           "original_max_position_embeddings": 32}}),
    "some-windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 6,
                               "layer_types": ["full_attention", "sliding_attention"] * 2}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "no-bias": ("glm4", {"attention_bias": False}),
    "no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
}  # fmt: skip


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, cp=2)], ids=str)
def test_logprobs_of_what_a_config_may_change_equal_transformers(tmp_path: Path, variant: str, layout: Layout) -> None:
    family, changes = VARIANTS[variant]
    assert largest_difference(save_tiny_model(family, tmp_path, **changes), layout) < 1e-4


@pytest.mark.parametrize("microbatches", PACKINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logprobs_do_not_depend_on_the_microbatch(
    tiny_models: TinyModels, family: str, microbatches: list[list[int]]
) -> None:
    assert largest_difference(tiny_models[family], Layout(pp=2), microbatches) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # two KV heads, and one
def test_more_tensor_ranks_than_key_and_value_heads(tiny_models: TinyModels, family: str) -> None:
    assert largest_difference(tiny_models[family], Layout(tp=4, sp=True)) < 1e-4


@pytest.mark.ranks8
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("layout", [EIGHT_RANKS, EVERYTHING], ids=str)
def test_logprobs_equal_transformers_on_eight_ranks(tiny_models: TinyModels, family: str, layout: Layout) -> None:
    assert largest_difference(tiny_models[family], layout) < 1e-4
