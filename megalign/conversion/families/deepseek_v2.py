"""DeepSeek-V2 and V2-Lite: latent attention; softmax scores, experts in groups that their best one speaks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import latent
from megalign.conversion.rules import Rule
from megalign.errors import UserError

HF_ARCHITECTURE = "DeepseekV2ForCausalLM"

_FIXED = {"scoring_func": "softmax", "norm_topk_prob": False}
_DEFAULTS = {
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "first_k_dense_replace": 0,
}
_METHODS = ("greedy", "group_limited_greedy")


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    read = latent.read_config(config, _FIXED, _DEFAULTS)
    method = config.get("topk_method", "greedy")
    if method not in _METHODS:
        raise UserError(f"config.json's topk_method={method!r} is not supported; {' and '.join(_METHODS)} are")
    experts = read.moe
    if method == "group_limited_greedy":
        missing = [key for key in ("n_group", "topk_group") if config.get(key) is None]
        if missing:
            raise UserError(
                f"topk_method 'group_limited_greedy' in config.json needs {' and '.join(missing)}; add them"
            )
        experts = replace(experts, num_groups=config["n_group"], top_groups=config["topk_group"])
    return replace(read, family="deepseek_v2", moe=experts)


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    return latent.rules(architecture)
