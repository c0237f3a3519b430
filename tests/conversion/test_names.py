"""Canonical Megatron names."""

from __future__ import annotations

from megalign.conversion.names import canonical


def test_layer_numbers_become_global() -> None:
    assert canonical("decoder.layers.1.mlp.linear_fc2.weight", 6) == (
        "decoder.layers.*.mlp.linear_fc2.weight",
        7,
    )


def test_transformer_engines_fused_norms_get_the_plain_names() -> None:
    layer, pattern = "decoder.layers.0.", "decoder.layers.*."
    fused = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    plain = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    assert [canonical(layer + name, 0)[0] for name in fused] == [pattern + name for name in plain]
    linear = "self_attention.linear_qkv.weight"
    assert canonical(layer + linear, 0)[0] == pattern + linear


def test_names_outside_layers_stay() -> None:
    assert canonical("decoder.final_layernorm.weight", 6) == ("decoder.final_layernorm.weight", None)
