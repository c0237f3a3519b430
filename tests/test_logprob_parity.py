"""Per-token logprobs of packed batches equal transformers', for every family, layout and packing."""

from __future__ import annotations

import pytest

from tests.layouts import EIGHT_RANKS, LAYOUTS, ONE_RANK, Layout
from tests.parity import largest_difference
from tests.tiny import CONFIGS, TinyModels

pytestmark = pytest.mark.megatron

PACKINGS = [[[4], [5, 0], [2, 3, 1]], [[5, 4, 3, 2, 1, 0], [0]]]


# The layout is the outer loop: its process groups are made once for all families.
@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("layout", [ONE_RANK, *LAYOUTS], ids=str)
def test_logprobs_equal_transformers(tiny_models: TinyModels, family: str, layout: Layout) -> None:
    assert largest_difference(tiny_models[family], layout) < 1e-4


@pytest.mark.parametrize("microbatches", PACKINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logprobs_do_not_depend_on_the_microbatch(
    tiny_models: TinyModels, family: str, microbatches: list[list[int]]
) -> None:
    assert largest_difference(tiny_models[family], Layout(pp=2), microbatches) < 1e-4


@pytest.mark.ranks8
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logprobs_equal_transformers_on_eight_ranks(tiny_models: TinyModels, family: str) -> None:
    assert largest_difference(tiny_models[family], EIGHT_RANKS) < 1e-4
