"""Gemma 2: Llama with norms around both parts, capped scores and logits, scaled embeddings and alternating windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import llama
from megalign.conversion.rules import Rule
from megalign.conversion.sandwich import sandwich_norms
from megalign.conversion.sliding import FULL, SLIDING, read_windows
from megalign.errors import UserError

HF_ARCHITECTURE = "Gemma2ForCausalLM"
# transformers' own.
_DEFAULTS = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    config = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    types = [FULL if layer % 2 else SLIDING for layer in range(config.get("num_hidden_layers") or 0)]
    return replace(read_gemma(config, types), family="gemma2")


def read_gemma(config: Mapping[str, Any], layer_types: list[str]) -> Architecture:
    """What Gemma 2 and 3 share; `layer_types` are those of a config without."""
    config = {**_DEFAULTS, **config}
    activation = config["hidden_activation"]
    if activation != "gelu_pytorch_tanh":
        raise UserError(f"config.json's hidden_activation={activation!r} is not supported; only 'gelu_pytorch_tanh' is")
    if config.get("use_bidirectional_attention"):
        raise UserError("config.json's use_bidirectional_attention=True is not supported; only causal attention is")
    return replace(
        llama.read_config({**config, "hidden_act": "silu"}),  # an older name, which is not read
        activation="gelu_tanh",
        zero_centered_norms=True,
        pad_token_id=0,
        sandwich_norms=True,
        embedding_scale=config["hidden_size"] ** 0.5,
        softmax_scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
        **read_windows(config, layer_types),
    )


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    return sandwich_norms(
        llama.rules(architecture),
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
