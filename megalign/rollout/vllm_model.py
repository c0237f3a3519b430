"""Where vLLM would compute a model otherwise than the trainer: refused, or told by fields of its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megalign.conversion.architecture import Architecture
from megalign.errors import UserError

if TYPE_CHECKING:
    from megalign.config import RolloutConfig


def check_model(architecture: Architecture, args: RolloutConfig, model_path: str) -> None:
    """UserError where the options do not fit the model."""
    if args.vllm_enable_expert_parallel and architecture.moe is None:
        raise UserError(
            f"vllm_enable_expert_parallel=True, but {model_path} is a dense {architecture.family} model without "
            "experts to split; leave the option out"
        )
    check_rope(architecture, args.vllm_max_model_length)


def check_rope(architecture: Architecture, max_model_length: int | None) -> None:
    """UserError where vLLM would rotate otherwise than the trainer: LongRoPE past the original length."""
    scaling = architecture.rope_scaling or {}
    if scaling.get("rope_type") != "longrope":
        return
    original = scaling["original_max_position_embeddings"]
    limit = max_model_length or architecture.max_position_embeddings
    if limit > original:
        raise UserError(
            f"vllm_max_model_length {limit} is past the model's original_max_position_embeddings {original}: vLLM "
            "would take LongRoPE's long factors for every sequence, the trainer takes them for longer ones only; set "
            f"vllm_max_model_length to {original} or less"
        )


def router_fields(architecture: Architecture) -> dict[str, Any]:
    """What a config.json of DeepSeek that transformers 5 has written lacks, and vLLM takes other defaults for.

    Without topk_method models/deepseek_v2.py:327 makes no selection bias, without scoring_func :387 scores by softmax.
    """
    experts = architecture.moe
    if architecture.mla is None or experts is None:
        return {}
    return {
        "scoring_func": experts.score,
        "topk_method": "noaux_tc" if experts.selection_bias else "group_limited_greedy",
        "n_group": experts.num_groups,
        "topk_group": experts.top_groups,
    }
