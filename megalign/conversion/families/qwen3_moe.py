"""Qwen3-MoE: Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import qwen3
from megalign.conversion.families.experts import routed_rules, with_experts
from megalign.conversion.families.qwen2_moe import read_experts
from megalign.conversion.rules import Rule

HF_ARCHITECTURE = "Qwen3MoeForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    experts = read_experts(config, num_experts=128, top_k=8, ffn_hidden_size=768)
    # transformers' default is hidden_size / num_attention_heads here, not 128.
    return replace(qwen3.read_config({"head_dim": None, **config}), family="qwen3_moe", moe=experts)


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    return with_experts(qwen3.rules(architecture), *routed_rules("model.layers.*.mlp."))
