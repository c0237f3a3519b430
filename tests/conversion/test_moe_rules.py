"""Families with experts, without ranks: config.json -> Architecture, and the weight rules of experts and latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of, rules_of
from megalign.conversion.hf_files import read_config
from megalign.conversion.rules import Vocab, expand, hf_shapes, pieces, shard_shape
from megalign.errors import UserError
from tests.tiny import MOE_CONFIGS, MOE_FAMILIES, save_tiny_model

NAMES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {**MOE_CONFIGS[family]().to_dict(), "architectures": [NAMES[family]], **changes}


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], Architecture]:
    """A directory as transformers writes it: its tensors, and its config as megalign reads it."""
    path = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return load_file(f"{path}/model.safetensors"), architecture_of(read_config(path))


def test_rules_name_exactly_the_tensors_of_the_files(saved: tuple[dict[str, Tensor], Architecture]) -> None:
    tensors, architecture = saved
    shapes = hf_shapes(rules_of(architecture), architecture)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_hf_to_shards_to_hf_is_bitwise(saved: tuple[dict[str, Tensor], Architecture], tp_size: int) -> None:
    tensors, architecture = saved
    back = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    for rule, key in expand(rules_of(architecture), architecture):
        for rank in range(tp_size):
            place = {"indices": key.indices, "tp_rank": rank, "tp_size": tp_size}
            shard = torch.full(shard_shape(rule, architecture, tp_size), float("nan"))
            parts = pieces(rule, architecture, **place)
            for piece in parts:
                shard[piece.shard_index] = piece.turned(tensors[piece.hf_name][piece.hf_index])
            assert isinstance(rule, Vocab) or not shard.isnan().any(), rule.megatron
            for piece in parts:
                back[piece.hf_name][piece.hf_index] = piece.turned(shard[piece.shard_index])
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_gate_and_up_of_an_expert_are_split_each_by_hand() -> None:
    architecture = architecture_of(config_of("mixtral"))
    rule = next(rule for rule in rules_of(architecture) if rule.per_expert and "linear_fc1" in rule.megatron)
    assert [key.indices for key in rule.keys(architecture)][3:6] == [(0, 3), (1, 0), (1, 1)]
    parts = pieces(rule, architecture, indices=(1, 3), tp_rank=1, tp_size=2)
    prefix = "model.layers.1.block_sparse_moe.experts.3."
    assert [(part.hf_name, part.hf_index[0], part.shard_index[0]) for part in parts] == [
        (prefix + "w1.weight", slice(24, 48), slice(0, 24)),
        (prefix + "w3.weight", slice(24, 48), slice(24, 48)),
    ]


def stacked_shard(tensor: Tensor, name: str, expert: int, rank: int) -> list[Any]:
    """Half of an expert's Megatron tensor, of gpt-oss with two hidden dims and experts of two."""
    small = replace(architecture_of(config_of("gpt_oss")), hidden_size=2)
    small = replace(small, moe=replace(small.moe, num_experts=2, top_k=1, ffn_hidden_size=2))
    rule = next(rule for rule in rules_of(small) if rule.per_expert and rule.megatron.endswith(name))
    shard = torch.full(shard_shape(rule, small, 2), float("nan"))
    for piece in pieces(rule, small, indices=(3, expert), tp_rank=rank, tp_size=2):
        assert piece.hf_name.startswith("model.layers.3.mlp.experts.") and piece.hf_shape == tensor.shape
        shard[piece.shard_index] = piece.turned(tensor[piece.hf_index])
    return shard.tolist()


def test_stacked_and_interleaved_experts_by_hand() -> None:
    # [2 experts, 2 hidden dims, gate 0, up 0, gate 1, up 1]; Megatron's rank has a gate, then its up, as rows.
    gate_up = torch.arange(16.0).view(2, 2, 4)
    assert stacked_shard(gate_up, "linear_fc1.weight", expert=0, rank=0) == [[0, 4], [1, 5]]
    assert stacked_shard(gate_up, "linear_fc1.weight", expert=1, rank=1) == [[10, 14], [11, 15]]
    assert stacked_shard(gate_up[:, 0], "linear_fc1.bias", expert=1, rank=1) == [10, 11]
    # [2 experts, 2 inner dims, 2 hidden dims]; a rank has the columns of its inner dim.
    down = torch.arange(8.0).view(2, 2, 2)
    assert stacked_shard(down, "linear_fc2.weight", expert=1, rank=0) == [[4], [5]]
    assert stacked_shard(down[:, 0], "linear_fc2.bias", expert=1, rank=1) == [4, 5]  # every rank has all of it


def test_gpt_oss_of_openai_and_of_transformers_5_are_one() -> None:
    # The file that OpenAI published, whose rope lies elsewhere, and without what transformers fills in.
    new = config_of("gpt_oss", rope_parameters=None)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "swiglu_alpha", "layer_types")}
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
    old |= {"rope_theta": 150000, "rope_scaling": {**yarn, "original_max_position_embeddings": 4096}}
    read = architecture_of(old)
    assert read == architecture_of(new)
    assert read.rotary_base == 150000.0 and read.rope_scaling["truncate"] is False
    assert [read.window(layer) for layer in range(4)] == [6, None, 6, None]
    assert (read.activation, read.activation_limit, read.up_offset) == ("quick_gelu", 0.5, 1.0)


def test_a_family_states_its_difference() -> None:
    read = {family: architecture_of(config_of(family)) for family in MOE_CONFIGS}
    experts = {family: architecture.moe for family, architecture in read.items()}
    assert {family: (moe.num_experts, moe.top_k) for family, moe in experts.items()} == {
        "mixtral": (4, 2),
        "qwen2_moe": (6, 2),
        "qwen3_moe": (6, 2),
        "deepseek_v2": (6, 2),
        "deepseek_v3": (8, 3),
        "gpt_oss": (6, 2),
    }
    assert {family: sorted(moe.dense_layers) for family, moe in experts.items()} == {
        "mixtral": [],
        "qwen2_moe": [0, 2],  # every second layer has experts
        "qwen3_moe": [2],
        "deepseek_v2": [],
        "deepseek_v3": [0],
        "gpt_oss": [],
    }
    assert [moe.shared_ffn_hidden_size for moe in experts.values()] == [None, 28, None, 40, 20, None]
    assert [moe.normalized for moe in experts.values()] == [True, False, True, False, True, True]
    v2, v3 = experts["deepseek_v2"], experts["deepseek_v3"]
    assert (v2.num_groups, v2.top_groups, v2.group_score_experts, v2.scaling) == (3, 2, 1, 1.7)
    assert (v3.num_groups, v3.top_groups, v3.group_score_experts, v3.scaling) == (4, 2, 2, 2.5)
    assert (read["deepseek_v2"].mla.q_lora_rank, read["deepseek_v3"].mla.q_lora_rank) == (None, 14)


def test_the_number_of_experts_has_an_old_and_a_new_name() -> None:
    new = config_of("qwen3_moe")
    count = new.pop("num_local_experts", new.pop("num_experts", None))
    assert count == 6
    old = {**new, "num_experts": 6}
    assert architecture_of(old) == architecture_of({**new, "num_local_experts": 6})


def test_rope_of_transformers_5_and_of_older_deepseek_configs_are_one() -> None:
    new = config_of("deepseek_v3")
    scaling = {key: value for key, value in new["rope_parameters"].items() if key not in ("rope_theta", "rope_type")}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **scaling}}
    assert architecture_of(old) == architecture_of(new)
    assert architecture_of(new).rope_scaling["mscale_all_dim"] == 0.9


def test_greedy_means_no_groups() -> None:
    greedy = architecture_of(config_of("deepseek_v2", topk_method="greedy", n_group=None, topk_group=None)).moe
    assert (greedy.num_groups, greedy.top_groups) == (1, 1)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5.*4 experts"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias=False"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "'noaux_tc'.*greedy"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "no num_experts_per_tok"),
        ("deepseek_v2", {"n_shared_experts": 0}, "n_shared_experts=0"),
        ("deepseek_v2", {"n_group": 4}, "n_group=4.*6 experts"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'.*'sigmoid'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("deepseek_v3", {"topk_group": 1}, "n_group=4 makes groups of 2 experts"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'.*yarn"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "lacks original_max"),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8, "attention_factor": 1.5}},
            "attention_factor=1.5",
        ),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4.*bf16.*Mxfp4Config.dequantize=True"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=False.*only True"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0.*only 1.702"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        architecture_of(config_of(family, **changes))
