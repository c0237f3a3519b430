"""Megatron parameter names: Transformer Engine's become the plain spec's, layer numbers become global."""

from __future__ import annotations

import re

# Transformer Engine fuses a norm into the linear that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def canonical(name: str, first_layer: int) -> tuple[str, int | None]:
    """A parameter's name in a chunk whose layers start at global `first_layer` -> (pattern, global layer)."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, None
    rest = _FUSED_NORMS.get(match[2], match[2])
    return f"decoder.layers.*.{rest}", int(match[1]) + first_layer
