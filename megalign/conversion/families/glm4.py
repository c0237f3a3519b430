"""GLM-4 (0414): Llama with norms after both parts, biases, and half of each head rotated in neighbouring pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import llama
from megalign.conversion.fused import fuse
from megalign.conversion.rope import without_partial_rotary
from megalign.conversion.rules import QKV, Rule
from megalign.conversion.sandwich import sandwich_norms

HF_ARCHITECTURE = "Glm4ForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    config, rotary_percent = without_partial_rotary({"head_dim": 128, **config}, 0.5)
    has_bias = config.pop("attention_bias", True)  # of queries, keys and values alone
    return replace(
        llama.read_config(config),
        family="glm4",
        qkv_bias=bool(has_bias),
        rotary_percent=rotary_percent,
        rotary_interleaved=True,
        sandwich_norms=True,
        pad_token_id=151329,
    )


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    mcore, hf = "decoder.layers.*.", "model.layers.*."
    found = fuse(
        llama.rules(architecture), f"{mcore}mlp.linear_fc1.weight", f"{hf}mlp.gate_up_proj.weight", "gate_up_size"
    )
    if architecture.qkv_bias:
        found.append(QKV.of(f"{mcore}self_attention.linear_qkv.bias", f"{hf}self_attn.{{}}_proj.bias"))
    return sandwich_norms(found, "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
