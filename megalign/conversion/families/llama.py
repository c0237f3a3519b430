"""Llama, the decoder that the other families differ from by a line or two. Defaults are transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.rope import read_rope
from megalign.conversion.rules import QKV, Copy, GateUp, Rule, Vocab
from megalign.errors import UserError

HF_ARCHITECTURE = "LlamaForCausalLM"

_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
# What would change the model's function and has no counterpart here: key -> the only value that is accepted.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise UserError(f"config.json has no {', '.join(missing)}; complete it from the model's original")
    for key, value in _FIXED.items():
        if config.get(key) is not None and config[key] != value:
            raise UserError(f"config.json's {key}={config[key]!r} is not supported; only {value!r} is")
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
    return Architecture(
        family="llama",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        **read_rope(config),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
    )


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model, in the order of the Hugging Face files."""
    mcore, hf = "decoder.layers.*.", "model.layers.*."
    # With tied embeddings the last of several stages holds a second copy of the embedding as its head.
    head = "model.embed_tokens.weight" if architecture.tied_embeddings else "lm_head.weight"
    proj = ("hidden_size", "query_size")
    down = ("hidden_size", "ffn_hidden_size")
    return [
        Vocab.of("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        QKV.of(mcore + "self_attention.linear_qkv.weight", hf + "self_attn.{}_proj.weight", "hidden_size"),
        Copy.of(mcore + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight", proj, dim=1),
        GateUp.of(mcore + "mlp.linear_fc1.weight", hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"),
        Copy.of(mcore + "mlp.linear_fc2.weight", hf + "mlp.down_proj.weight", down, dim=1),
        Copy.of(mcore + "input_layernorm.weight", hf + "input_layernorm.weight", ("hidden_size",)),
        Copy.of(mcore + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight", ("hidden_size",)),
        Copy.of("decoder.final_layernorm.weight", "model.norm.weight", ("hidden_size",)),
        Vocab.of("output_layer.weight", head, duplicate=architecture.tied_embeddings),
    ]
