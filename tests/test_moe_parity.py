"""Models with experts: logprobs, every gradient and two AdamW steps equal transformers' at every layout.

The machinery is that of the dense families' parity tests; here are the layouts that experts add. Variants of the
configs and AdamW's steps have no mark: the newest Megatron-Core is asked for each family's numbers, not for more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import EVERYTHING, ONE_RANK, Layout
from tests.moe_layouts import MOE_LAYOUTS
from tests.parity import largest_difference
from tests.test_gradient_parity import check_gradients, check_two_steps
from tests.tiny import MOE_FAMILIES, TinyModels, save_tiny_model

# What splits experts in every way, for the second run on the newest Megatron-Core.
MOST_SPLIT = [Layout(cp=2), Layout(tp=2, sp=True, ep=2, etp=1), Layout(tp=2, sp=True, etp=2), Layout(dp=2, ep=2, pp=2)]
SPLITS = [pytest.param(at, marks=pytest.mark.megatron) if at in MOST_SPLIT else at for at in MOE_LAYOUTS]


# The layout is the outer loop: its process groups are made once for all families. tools/parity_matrix.py has them all;
# the gradients below, at every layout, are those of the same logprobs.
@pytest.mark.megatron
@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("layout", MOST_SPLIT, ids=str)
def test_logprobs_equal_transformers(tiny_models: TinyModels, family: str, layout: Layout) -> None:
    assert largest_difference(tiny_models[family], layout) < 1e-4


# One replica has two microbatches, the other one: it would wait for the other's tokens forever.
@pytest.mark.megatron
@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(dp=2, etp=2), Layout(dp=2, ep=2, pp=2)], ids=str)
def test_replicas_may_have_different_numbers_of_microbatches(tiny_models: TinyModels, layout: Layout) -> None:
    assert largest_difference(tiny_models["mixtral"], layout, [[0, 1, 3], [4], [5, 2]]) < 1e-4


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe-not-normalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2-moe-normalized": ("qwen2_moe", {"norm_topk_prob": True}),
    "mixtral-one-expert": ("mixtral", {"num_experts_per_tok": 1}),
    "deepseek-v2-greedy": ("deepseek_v2", {"topk_method": "greedy"}),
    "deepseek-v2-query-latent": ("deepseek_v2", {"q_lora_rank": 14}),
    "deepseek-v3-not-normalized": ("deepseek_v3", {"norm_topk_prob": False}),
    "deepseek-v3-no-query-latent": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek-v3-plain-rope": ("deepseek_v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, sp=True, cp=2)], ids=str)
def test_logprobs_of_what_a_config_may_change_equal_transformers(tmp_path: Path, variant: str, layout: Layout) -> None:
    family, changes = VARIANTS[variant]
    assert largest_difference(save_tiny_model(family, tmp_path, **changes), layout) < 1e-4


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("layout", SPLITS, ids=str)
def test_every_gradient_equals_plain_autograd(tiny_models: TinyModels, family: str, layout: Layout) -> None:
    check_gradients(tiny_models[family], layout, "dapo")


@pytest.mark.megatron
@pytest.mark.ranks8
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_every_gradient_with_everything_split(tiny_models: TinyModels, family: str) -> None:
    check_gradients(tiny_models[family], EVERYTHING._replace(ep=2, etp=2), "dapo")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("layout", [ONE_RANK, *MOST_SPLIT, Layout(dp=2, etp=2)], ids=str)
def test_two_clipped_steps_equal_torch_adamw(tiny_models: TinyModels, family: str, layout: Layout) -> None:
    check_two_steps(tiny_models[family], layout)
