"""Mixtral: Llama whose feed-forward part is experts, weighted by the softmax over those that a token chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture, MixtureOfExperts
from megalign.conversion.families import llama
from megalign.conversion.families.experts import routed_rules, with_experts
from megalign.conversion.rules import Rule
from megalign.errors import UserError

HF_ARCHITECTURE = "MixtralForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    for key, off in {"sliding_window": None, "router_jitter_noise": 0.0}.items():
        if config.get(key, off) not in (None, off):
            raise UserError(f"config.json's {key}={config[key]!r} is not supported; only {off!r} is")
    # transformers' defaults where they are not Llama's.
    config = {"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5, **config}
    read = llama.read_config(config)
    experts = MixtureOfExperts(
        num_experts=config.get("num_local_experts", 8),
        top_k=config.get("num_experts_per_tok", 2),
        ffn_hidden_size=read.ffn_hidden_size,
        normalized=True,
    )
    return replace(read, family="mixtral", moe=experts)


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    routed = routed_rules("model.layers.*.block_sparse_moe.", gate="w1", up="w3", down="w2")
    return with_experts(llama.rules(architecture), *routed)
