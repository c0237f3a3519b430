"""The weight rules without ranks: fake tensor-parallel shards of tiny models, and cases worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of, rules_of
from megalign.conversion.names import numbered
from megalign.conversion.rules import QKV, Rule, Vocab, expand, hf_shapes, pieces, shard_shape
from tests.tiny import CONFIGS, DENSE_FAMILIES

FAMILIES = tuple(DENSE_FAMILIES)
# 24 query and 6 key/value heads: tp 4 cuts groups, tp 8 even heads, and is more than the key/value heads.
HEADS = {"num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 48}


def model_and_architecture(family: str, **changes: object) -> tuple[dict[str, Tensor], Architecture]:
    """A random model's state dict and its Architecture, read from the config that transformers would save."""
    config = CONFIGS[family]()
    if family == "phi3":  # whose rope's factors are as many as a head's dims ask for
        changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **changes}
    for name, value in {**HEADS, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state, architecture_of({**config.to_dict(), "architectures": [type(model).__name__]})


def load_shard(rule: Rule, state: dict[str, Tensor], architecture: Architecture, **place: Any) -> Tensor:
    """One shard, filled piece by piece; what no piece covers stays NaN."""
    shard = torch.full(shard_shape(rule, architecture, place["tp_size"]), float("nan"))
    for piece in pieces(rule, architecture, **place):
        shard[piece.shard_index] = state[piece.hf_name][piece.hf_index]
    return shard


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_shards_to_hf_is_bitwise(family: str, tp_size: int) -> None:
    state, architecture = model_and_architecture(family)
    back = {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}
    for rule, key in expand(rules_of(architecture), architecture):
        for rank in range(tp_size):
            place = {"indices": key.indices, "tp_rank": rank, "tp_size": tp_size}
            shard = load_shard(rule, state, architecture, **place)
            assert isinstance(rule, Vocab) or not shard.isnan().any(), rule.megatron
            for piece in pieces(rule, architecture, **place):
                back[piece.hf_name][piece.hf_index] = shard[piece.shard_index]
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_name_exactly_the_tensors_of_transformers(family: str) -> None:
    state, architecture = model_and_architecture(family)
    shapes = hf_shapes(rules_of(architecture), architecture)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_untied_models_have_a_head_and_tied_ones_a_duplicate() -> None:
    for tied in (True, False):
        _, architecture = model_and_architecture("llama", tie_word_embeddings=tied)
        head = next(rule for rule in rules_of(architecture) if rule.megatron == "output_layer.weight")
        assert head.duplicate is tied
        assert head.hf[0].name == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def test_tensors_come_in_the_order_embedding_layers_norm_head() -> None:
    _, architecture = model_and_architecture("qwen2")
    names = list(hf_shapes(rules_of(architecture), architecture))
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2, 3}


def small(**changes: object) -> Architecture:
    sizes = {
        "family": "qwen2",
        "num_layers": 1,
        "hidden_size": 3,
        "ffn_hidden_size": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 1,
        "vocab_size": 5,
        "max_position_embeddings": 8,
        "norm_epsilon": 1e-6,
        "rotary_base": 1e4,
    }
    return Architecture(**{**sizes, **changes})


def test_fused_qkv_order_by_hand() -> None:
    # Four query heads and two key/value heads of size 1. Megatron's rows: q0 q1 k0 v0 | q2 q3 k1 v1.
    rule = QKV.of("bias", "{}")
    state = {"q": torch.tensor([0.0, 1, 2, 3]), "k": torch.tensor([10.0, 11]), "v": torch.tensor([20.0, 21])}
    place = {"indices": (), "tp_rank": 0, "tp_size": 1}
    assert load_shard(rule, state, small(), **place).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    quarters = [
        load_shard(rule, state, small(), **{**place, "tp_rank": rank, "tp_size": 4}).tolist() for rank in range(4)
    ]
    assert quarters == [[0, 1], [10, 20], [2, 3], [11, 21]]  # tp 4 over 2 groups cuts each group


def test_gate_and_up_are_split_each_by_hand() -> None:
    state = {
        "model.layers.0.mlp.gate_proj.weight": torch.arange(4.0)[:, None].expand(4, 3),
        "model.layers.0.mlp.up_proj.weight": 10 + torch.arange(4.0)[:, None].expand(4, 3),
    }
    rule = next(rule for rule in rules_of(small()) if "linear_fc1" in rule.megatron)
    halves = [
        load_shard(rule, state, small(), indices=(0,), tp_rank=rank, tp_size=2)[:, 0].tolist() for rank in range(2)
    ]
    assert halves == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_pad_rows_of_the_vocabulary_have_no_piece() -> None:
    state = {"model.embed_tokens.weight": torch.arange(5.0)[:, None].expand(5, 3)}
    rule = rules_of(small())[0]
    shards = [load_shard(rule, state, small(), indices=(), tp_rank=rank, tp_size=4)[:, 0] for rank in range(4)]
    assert [shard.shape for shard in shards] == [(2,)] * 4  # 5 rows padded to 8
    assert torch.cat(shards)[:5].tolist() == [0, 1, 2, 3, 4]
    assert torch.cat(shards)[5:].isnan().all()
    assert pieces(rule, small(), indices=(), tp_rank=3, tp_size=4) == []


def test_rows_of_fused_tensors_go_where_those_of_single_ones_do_by_hand() -> None:
    # One tensor of q0 q1 q2 q3 k0 k1 v0 v1, and one of the gates 0 to 3 and the ups 0 to 3.
    found = {rule.megatron.rpartition(".")[0]: rule for rule in rules_of(small(family="phi3"))}
    rule, place = found["decoder.layers.*.self_attention.linear_qkv"], {"indices": (0,), "tp_size": 2}
    rows = torch.tensor([0.0, 1, 2, 3, 10, 11, 20, 21])
    state = {"model.layers.0.self_attn.qkv_proj.weight": rows[:, None].expand(8, 3)}
    halves = [load_shard(rule, state, small(), tp_rank=rank, **place)[:, 0].tolist() for rank in range(2)]
    assert halves == [[0, 1, 10, 20], [2, 3, 11, 21]]
    rows = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13])
    state = {"model.layers.0.mlp.gate_up_proj.weight": rows[:, None].expand(8, 3)}
    rule = found["decoder.layers.*.mlp.linear_fc1"]
    halves = [load_shard(rule, state, small(), tp_rank=rank, **place)[:, 0].tolist() for rank in range(2)]
    assert halves == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_output_projections_are_split_by_columns() -> None:
    rule = next(rule for rule in rules_of(small()) if "linear_proj" in rule.megatron)
    state = {"model.layers.0.self_attn.o_proj.weight": torch.arange(12.0).view(3, 4)}
    shard = load_shard(rule, state, small(), indices=(0,), tp_rank=1, tp_size=2)
    assert shard.tolist() == [[2, 3], [6, 7], [10, 11]]
    assert numbered(rule.megatron, (7,)) == "decoder.layers.7.self_attention.linear_proj.weight"
