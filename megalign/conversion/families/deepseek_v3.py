"""DeepSeek-V3 and R1: latent attention; sigmoid scores with a selection bias, experts in groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import latent
from megalign.conversion.families.experts import selection_bias_rule
from megalign.conversion.rules import Rule

HF_ARCHITECTURE = "DeepseekV3ForCausalLM"

_FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
_DEFAULTS = {
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    read = latent.read_config(config, _FIXED, _DEFAULTS)
    config = {**_DEFAULTS, **config}
    experts = replace(
        read.moe,
        score="sigmoid",
        selection_bias=True,
        normalized=bool(config["norm_topk_prob"]),
        num_groups=config["n_group"],
        top_groups=config["topk_group"],
        group_score_experts=2,
    )
    # transformers 5 has a name of its own; the files' layers behind the last are what it leaves out as well.
    mtp = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
    return replace(read, family="deepseek_v3", moe=experts, num_mtp_layers=mtp or 0)


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    return [*latent.rules(architecture), selection_bias_rule("model.layers.*.mlp.gate.e_score_correction_bias")]
