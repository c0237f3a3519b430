"""Where vLLM would compute a model otherwise than the trainer: refused, or told by fields of its config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.rope import yarn_growth
from megalign.errors import UserError

if TYPE_CHECKING:
    from megalign.config import RolloutConfig

# Families that vLLM computes with its models/llama.py.
_ON_VLLMS_LLAMA = ("llama", "mistral", "phi3")


def check_model(architecture: Architecture, args: RolloutConfig, model_path: str) -> None:
    """UserError where the options do not fit the model."""
    if args.vllm_enable_expert_parallel and architecture.moe is None:
        raise UserError(
            f"vllm_enable_expert_parallel=True, but {model_path} is a dense {architecture.family} model without "
            "experts to split; leave the option out"
        )
    check_rope(architecture, args.vllm_max_model_length)


def check_rope(architecture: Architecture, max_model_length: int | None) -> None:
    """UserError where vLLM would rotate otherwise than the trainer: past the length that its tables are made for."""
    scaling = architecture.rope_scaling or {}
    kind, original = scaling.get("rope_type"), scaling.get("original_max_position_embeddings", 0)
    limit = max_model_length or architecture.max_position_embeddings
    if kind == "longrope" and limit > original:
        raise UserError(
            f"vllm_max_model_length {limit} is past the model's original_max_position_embeddings {original}: vLLM "
            "would take LongRoPE's long factors for every sequence, the trainer takes them for longer ones only; set "
            f"vllm_max_model_length to {original} or less"
        )
    if kind == "yarn" and limit > (longest := math.ceil(scaling["factor"] * original)):
        raise UserError(
            f"vllm_max_model_length {limit} is past factor * original_max_position_embeddings {longest} of the model's "
            "rope_parameters, where vLLM's table of angles ends and its logits are no numbers any more; set "
            f"vllm_max_model_length to {longest} or less"
        )


def config_fields(architecture: Architecture) -> dict[str, Any]:
    """What vLLM is told in place of the model's config.json, where it reads that otherwise than transformers does."""
    fields: dict[str, Any] = {}
    if not architecture.sliding_layers:
        fields["sliding_window"] = None  # of a family without windows: transformers does not look at it
    if architecture.family in _ON_VLLMS_LLAMA:
        fields |= {"logit_scale": 1.0, "bias": False, "qkv_bias": False}  # of others, ignored in these
    if architecture.rope_scaling is not None:
        fields |= _rope_fields(architecture, architecture.rope_scaling)
    if architecture.mla is not None and architecture.moe is not None:
        # Of DeepSeek, transformers 5 writes none of them. Without topk_method models/deepseek_v2.py:327 makes no
        # selection bias, without scoring_func :387 scores by softmax.
        fields |= {
            "scoring_func": architecture.moe.score,
            "topk_method": "noaux_tc" if architecture.moe.selection_bias else "group_limited_greedy",
            "n_group": architecture.moe.num_groups,
            "topk_group": architecture.moe.top_groups,
        }
    return fields


def _rope_fields(architecture: Architecture, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """What multiplies sines and cosines, in the one way of saying it that vLLM heeds."""
    rope = {"rope_theta": architecture.rotary_base, "partial_rotary_factor": architecture.rotary_percent, **scaling}
    if scaling["rope_type"] == "longrope":
        # Its own layers look at neither factor nor attention_factor; those of vllm_model_impl="transformers" do.
        factor = scaling["attention_factor"]
        return {"rope_parameters": {**rope, "short_mscale": factor, "long_mscale": factor}}
    if architecture.mla is None:
        return {}
    # Where one of mscale and mscale_all_dim is missing, it takes 1 and 0; transformers takes neither of them there, but
    # mscale_all_dim for the scores' scale all the same.
    if scaling["mscale"] is None:
        of_one, of_scores = (yarn_growth(scaling["factor"], weight) for weight in (1.0, scaling["mscale_all_dim"]))
        # It divides mscale's growth by mscale_all_dim's, and growth is linear in the weight.
        rope["mscale"] = (of_one * of_scores - 1) / (of_one - 1) if of_one > 1 else 1.0
    return {"rope_parameters": rope}
