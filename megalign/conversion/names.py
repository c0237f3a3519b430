"""Megatron parameter names: Transformer Engine's become the plain spec's, layers and experts are numbered globally."""

from __future__ import annotations

import re
from typing import NamedTuple

# Transformer Engine fuses a norm into the linear that follows it.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
# Transformer Engine's grouped product holds weight0, weight1, ... of a rank's experts.
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.(?:weight|bias))(\d+)")


class Key(NamedTuple):
    """A Megatron tensor of the whole model: its pattern, and what its `*` are: nothing, layer, or layer and expert."""

    pattern: str
    indices: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Megatron's name, numbered globally."""
        return numbered(self.pattern, self.indices)


def numbered(pattern: str, indices: tuple[int, ...]) -> str:
    """The pattern with its `*` replaced, from left to right; it may have fewer of them than there are indices."""
    for index in indices:
        pattern = pattern.replace("*", str(index), 1)
    return pattern


def canonical(name: str, first_layer: int, first_expert: int = 0) -> Key:
    """A parameter's name in a chunk whose layers and experts start at these global numbers -> its key."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return Key(name)
    layer, rest = int(match[1]) + first_layer, FUSED_NORMS.get(match[2], match[2])
    if grouped := _GROUPED_EXPERT.fullmatch(rest):
        rest = f"mlp.experts.local_experts.{grouped[2]}.{grouped[1]}"
    if expert := _EXPERT.fullmatch(rest):
        pattern = f"decoder.layers.*.mlp.experts.local_experts.*.{expert[2]}"
        return Key(pattern, (layer, int(expert[1]) + first_expert))
    return Key(f"decoder.layers.*.{rest}", (layer,))
