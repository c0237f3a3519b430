"""Whether the values of a config.json are of the kind that their names promise; the rest is a family's matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.sliding import FULL, SLIDING
from megalign.errors import UserError

_COUNTS = {
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "original_max_position_embeddings",
    "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_group",
    "topk_group", "shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "decoder_sparse_step",
}  # fmt: skip
_COUNTS_FROM_ZERO = {
    "first_k_dense_replace", "max_window_layers", "num_nextn_predict_layers", "n_shared_experts", "sliding_window",
}  # fmt: skip
_NUMBERS = {
    "rms_norm_eps", "rope_theta", "routed_scaling_factor", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "swiglu_limit", "factor", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor", "partial_rotary_factor",
}  # fmt: skip
_FLAGS = {"tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "qkv_bias", "truncate"}
_LISTS = {"layer_types", "mlp_only_layers", "short_factor", "long_factor"}
_MAPPINGS = {"rope_scaling", "rope_parameters"}
# Where None says something of its own, or stands for the default.
_MAY_BE_NONE = {
    "num_key_value_heads", "head_dim", "original_max_position_embeddings", "sliding_window", "num_experts",
    "num_local_experts", "n_group", "topk_group", "q_lora_rank", "num_nextn_predict_layers", "attn_logit_softcapping",
    "final_logit_softcapping", "attention_factor", "partial_rotary_factor", "factor", "beta_fast", "beta_slow",
    *_LISTS, *_MAPPINGS,
}  # fmt: skip


def check_values(config: Mapping[str, Any]) -> None:
    """UserError for the first value of the wrong kind, in the rope's own mappings too; unknown keys pass."""
    if config.get("is_causal") is False:
        raise UserError("config.json's is_causal=False is not supported: attention sees earlier tokens only; use True")
    for key, value in config.items():
        if value is None:
            if key in _COUNTS | _COUNTS_FROM_ZERO | _NUMBERS | _FLAGS and key not in _MAY_BE_NONE:
                raise UserError(f"config.json has no {key} but null; complete it from the model's original")
            continue
        rule = _broken_rule(key, value)
        if rule is not None:
            raise UserError(f"config.json's {key}={value!r} must be {rule}; copy it from the model's original")
        if key in _MAPPINGS:
            for inner in (value, *(part for part in value.values() if isinstance(part, Mapping))):
                check_values({name: part for name, part in inner.items() if not isinstance(part, Mapping)})


def check_layer_types(config: Mapping[str, Any], architecture: Architecture) -> None:
    """UserError where layer_types says otherwise than what the family has read."""
    types = config.get("layer_types")
    if types is None:
        return
    computed = [SLIDING if layer in architecture.sliding_layers else FULL for layer in range(architecture.num_layers)]
    if list(types) != computed:
        raise UserError(
            f"config.json's layer_types={types!r} is not what {architecture.family} computes, {computed!r}; set one to "
            "the other, or drop it"
        )


def _broken_rule(key: str, value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _COUNTS and not (is_number and isinstance(value, int) and value >= 1):
        return "a whole number from 1"
    if key in _COUNTS_FROM_ZERO and not (is_number and isinstance(value, int) and value >= 0):
        return "a whole number from 0"
    if key in _NUMBERS and not (is_number and value > 0):
        return "a number above 0"
    if key in _FLAGS and not isinstance(value, bool):
        return "true or false"
    if key in _LISTS and (isinstance(value, str) or not isinstance(value, Sequence)):
        return "a list"
    if key in _MAPPINGS and not isinstance(value, Mapping):
        return "a mapping"
    return None
