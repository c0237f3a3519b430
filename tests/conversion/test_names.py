"""Canonical Megatron names."""

from __future__ import annotations

import pytest

from megalign.conversion.names import Key, canonical, numbered


def test_layer_numbers_become_global() -> None:
    key = canonical("decoder.layers.1.mlp.linear_fc2.weight", 6)
    assert key == Key("decoder.layers.*.mlp.linear_fc2.weight", (7,))
    assert key.name == "decoder.layers.7.mlp.linear_fc2.weight"


def test_transformer_engines_fused_norms_get_the_plain_names() -> None:
    layer, pattern = "decoder.layers.0.", "decoder.layers.*."
    fused = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    plain = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    assert [canonical(layer + name, 0).pattern for name in fused] == [pattern + name for name in plain]
    linear = "self_attention.linear_qkv.weight"
    assert canonical(layer + linear, 0).pattern == pattern + linear


@pytest.mark.parametrize("name", ["local_experts.1.linear_fc1.weight", "linear_fc1.weight1"], ids=["plain", "grouped"])
def test_experts_get_global_numbers_and_the_plain_names(name: str) -> None:
    key = canonical(f"decoder.layers.0.mlp.experts.{name}", 2, first_expert=4)
    assert key == Key("decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight", (2, 5))
    assert (
        numbered("model.layers.*.mlp.experts.*.up_proj.weight", key.indices)
        == "model.layers.2.mlp.experts.5.up_proj.weight"
    )
    assert numbered("model.layers.*.mlp.experts.gate_up_proj", key.indices) == "model.layers.2.mlp.experts.gate_up_proj"


def test_names_outside_layers_stay() -> None:
    assert canonical("decoder.final_layernorm.weight", 6) == Key("decoder.final_layernorm.weight", ())
