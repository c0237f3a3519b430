"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one more that every token passes through a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture, MixtureOfExperts
from megalign.conversion.families import qwen2
from megalign.conversion.families.experts import routed_rules, shared_rules, with_experts
from megalign.conversion.rules import Copy, Rule
from megalign.errors import UserError

HF_ARCHITECTURE = "Qwen2MoeForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    if not config.get("qkv_bias", True):
        raise UserError("config.json's qkv_bias=False is not supported; only True is")
    experts = replace(
        read_experts(config, num_experts=60, top_k=4, ffn_hidden_size=1408),
        shared_ffn_hidden_size=config.get("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    return replace(qwen2.read_config(config), family="qwen2_moe", moe=experts)


def read_experts(config: Mapping[str, Any], *, num_experts: int, top_k: int, ffn_hidden_size: int) -> MixtureOfExperts:
    """What Qwen's configs say of experts; the numbers are transformers' defaults."""
    if config.get("use_sliding_window"):
        raise UserError(
            "config.json's use_sliding_window=True is not supported; only False is, full attention in every layer"
        )
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(config.get("num_hidden_layers") or 0)
    # transformers 5 writes Qwen3's as num_local_experts, older versions as num_experts.
    named = [config[key] for key in ("num_local_experts", "num_experts") if config.get(key) is not None]
    if len(set(named)) > 1:
        raise UserError(f"config.json's num_local_experts={named[0]} contradicts num_experts={named[1]}; keep one")
    return MixtureOfExperts(
        num_experts=named[0] if named else num_experts,
        top_k=config.get("num_experts_per_tok", top_k),
        ffn_hidden_size=config.get("moe_intermediate_size", ffn_hidden_size),
        normalized=config.get("norm_topk_prob", False),
        dense_layers=frozenset(layer for layer in layers if layer in dense or (layer + 1) % step),
    )


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    gate = Copy.of(
        "decoder.layers.*.mlp.shared_experts.gate_weight",
        "model.layers.*.mlp.shared_expert_gate.weight",
        ("one", "hidden_size"),
    )
    shared = [*shared_rules("model.layers.*.mlp.shared_expert."), gate]
    return with_experts(qwen2.rules(architecture), *routed_rules("model.layers.*.mlp."), *shared)
