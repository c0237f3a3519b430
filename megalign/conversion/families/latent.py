"""What DeepSeek's families share: latent attention, its rotary scaling, and which layers have experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture, LatentAttention, MixtureOfExperts
from megalign.conversion.families import llama
from megalign.conversion.families.experts import routed_rules, shared_rules, with_experts
from megalign.conversion.rules import Copy, Rule
from megalign.errors import UserError

_REQUIRED = ("num_experts_per_tok", "n_routed_experts", "moe_intermediate_size", "kv_lora_rank")
_ROPE = ("rope_scaling", "rope_parameters")


def read_config(config: Mapping[str, Any], fixed: Mapping[str, Any], defaults: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture without what the family's router does.

    `fixed` are settings that transformers ignores, or that are not built, with the only value that is accepted;
    `defaults` are transformers' own.
    """
    for key, value in {"moe_layer_freq": 1, **fixed}.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json's {key}={config[key]!r} is not supported; only {value!r} is")
    config = {**defaults, **config}
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise UserError(f"config.json has no {', '.join(missing)}; complete it from the model's original")
    shared = config["n_shared_experts"] or 0
    if shared < 1:
        raise UserError(f"config.json's n_shared_experts={config['n_shared_experts']!r} must be at least 1")
    # Its numbers of key/value heads and of head sizes mean nothing here, and its rotary part is read below.
    decoder = llama.read_config({**config, **dict.fromkeys((*_ROPE, "num_key_value_heads", "head_dim"))})
    heads = decoder.num_attention_heads
    if config.get("num_key_value_heads") not in (None, heads):
        raise UserError(
            f"config.json's num_key_value_heads={config['num_key_value_heads']} is not supported; latent attention "
            f"has as many as num_attention_heads={heads}"
        )
    if config.get("head_dim") not in (None, config["qk_rope_head_dim"]):
        raise UserError(
            f"config.json's head_dim={config['head_dim']} contradicts qk_rope_head_dim={config['qk_rope_head_dim']}, "
            "the part of a head that is rotated; drop head_dim"
        )
    if config["qk_rope_head_dim"] % 2:
        raise UserError(f"config.json's qk_rope_head_dim={config['qk_rope_head_dim']} must be even: dims turn in pairs")
    latent = LatentAttention(
        num_heads=heads,
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        nope_head_dim=config["qk_nope_head_dim"],
        rope_head_dim=config["qk_rope_head_dim"],
        value_head_dim=config["v_head_dim"],
    )
    experts = MixtureOfExperts(
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        shared_ffn_hidden_size=shared * config["moe_intermediate_size"],
        dense_layers=frozenset(range(min(config["first_k_dense_replace"], decoder.num_layers))),
        scaling=config["routed_scaling_factor"],
        router_in_fp32=True,
    )
    rotary_base, rope_scaling = _read_rope(config)
    return replace(
        decoder,
        head_dim=latent.nope_head_dim + latent.rope_head_dim,
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        mla=latent,
        moe=experts,
    )


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model, but for what the family's router has besides its weight."""
    mcore, hf = "decoder.layers.*.self_attention.", "model.layers.*.self_attn."
    others = [rule for rule in llama.rules(architecture) if not rule.megatron.startswith(mcore)]
    experts = [*routed_rules("model.layers.*.mlp."), *shared_rules("model.layers.*.mlp.shared_experts.")]
    attention = [
        *_query_rules(architecture, mcore, hf),
        # Whole on every tensor rank: each projects its own tokens (model.latent_attention; Transformer Engine too).
        Copy.of(
            mcore + "linear_kv_down_proj.weight", hf + "kv_a_proj_with_mqa.weight", ("mla.down_size", "hidden_size")
        ),
        Copy.of(mcore + "kv_layernorm.weight", hf + "kv_a_layernorm.weight", ("mla.kv_lora_rank",)),
        Copy.of(
            mcore + "linear_kv_up_proj.weight", hf + "kv_b_proj.weight", ("mla.up_size", "mla.kv_lora_rank"), dim=0
        ),
        Copy.of(mcore + "linear_proj.weight", hf + "o_proj.weight", ("hidden_size", "mla.value_size"), dim=1),
    ]
    return with_experts([*others, *attention], *experts)


def _query_rules(architecture: Architecture, mcore: str, hf: str) -> list[Rule]:
    if architecture.mla.q_lora_rank is None:
        return [Copy.of(mcore + "linear_q_proj.weight", hf + "q_proj.weight", ("mla.query_size", "hidden_size"), dim=0)]
    rank = "mla.q_lora_rank"
    return [
        Copy.of(mcore + "linear_q_down_proj.weight", hf + "q_a_proj.weight", (rank, "hidden_size")),
        Copy.of(mcore + "q_layernorm.weight", hf + "q_a_layernorm.weight", (rank,)),
        Copy.of(mcore + "linear_q_up_proj.weight", hf + "q_b_proj.weight", ("mla.query_size", rank), dim=0),
    ]


def _read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling), with transformers' defaults; see Architecture.rope_scaling."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "yarn":
        raise UserError(f"rope_type {kind!r} in config.json is not supported with latent attention; default, yarn are")
    for key, value in {"attention_factor": None, "truncate": True}.items():
        if rope.get(key, value) != value:
            raise UserError(f"rope_parameters' {key}={rope[key]!r} is not supported; only {value!r} is")
    original = rope.get("original_max_position_embeddings")
    if original is None:
        raise UserError("rope_type 'yarn' in config.json lacks original_max_position_embeddings; add it")
    # transformers takes either magnitude's absence for both's where it scales sines and cosines.
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return base, {
        "rope_type": "yarn",
        "factor": float(rope.get("factor") or config["max_position_embeddings"] / original),
        "original_max_position_embeddings": original,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(rope["mscale"]) if both else None,
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
    }
