"""gpt-oss: Llama with biases, attention sinks, alternating windows, and experts with a clamped gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture, MixtureOfExperts
from megalign.conversion.families import llama
from megalign.conversion.families.experts import with_experts
from megalign.conversion.rules import QKV, Copy, Rule
from megalign.conversion.sliding import FULL, SLIDING, read_windows
from megalign.conversion.stacked import InterleavedGateUp, stacked_copy
from megalign.errors import UserError

HF_ARCHITECTURE = "GptOssForCausalLM"
# transformers' own.
_DEFAULTS = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    config = {**_DEFAULTS, **config}
    _check(config)
    if not config.get("rope_scaling") and not config.get("rope_parameters"):
        config["rope_parameters"] = _ROPE
    types = [FULL if layer % 2 else SLIDING for layer in range(config.get("num_hidden_layers") or 0)]
    read = llama.read_config({**config, "attention_bias": False})
    experts = MixtureOfExperts(
        num_experts=config.get("num_local_experts", 128),
        top_k=config.get("num_experts_per_tok", 4),
        ffn_hidden_size=read.ffn_hidden_size,
        normalized=True,  # the softmax over those that a token chooses
    )
    return replace(
        read,
        family="gpt_oss",
        activation="quick_gelu",
        activation_limit=config.get("swiglu_limit", 7.0),
        up_offset=1.0,
        qkv_bias=True,
        linear_bias=True,
        attention_sinks=True,
        moe=experts,
        **read_windows(config, types),
    )


def _check(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        raise UserError(
            f"the model's experts are quantized (quantization_config in config.json: {quantization.get('quant_method')}"
            "), and training needs them whole; make a bf16 directory once, with transformers: "
            "GptOssForCausalLM.from_pretrained(path, dtype='bfloat16', "
            "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(new_path)"
        )
    for key, only in {"attention_bias": True, "swiglu_alpha": 1.702}.items():
        if config.get(key, only) != only:
            raise UserError(f"config.json's {key}={config[key]!r} is not supported; only {only!r} is")


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    attention, self_attn = "decoder.layers.*.self_attention.", "model.layers.*.self_attn."
    router, experts = "model.layers.*.mlp.router.", "model.layers.*.mlp.experts."
    mlp, one = "decoder.layers.*.mlp.", "decoder.layers.*.mlp.experts.local_experts.*."
    gate_up, rows = experts + "gate_up_proj", "moe.gate_up_size"
    down = experts + "down_proj"
    return with_experts(
        [
            *llama.rules(architecture),
            QKV.of(attention + "linear_qkv.bias", self_attn + "{}_proj.bias"),
            Copy.of(attention + "linear_proj.bias", self_attn + "o_proj.bias", ("hidden_size",)),
            Copy.of(attention + "core_attention.softmax_offset", self_attn + "sinks", ("num_attention_heads",), dim=0),
        ],
        Copy.of(mlp + "router.weight", router + "weight", ("num_experts", "hidden_size")),
        Copy.of(mlp + "router.bias", router + "bias", ("num_experts",)),
        InterleavedGateUp.of(one + "linear_fc1.weight", gate_up, "hidden_size", rows),
        InterleavedGateUp.of(one + "linear_fc1.bias", gate_up + "_bias", rows),
        stacked_copy(one + "linear_fc2.weight", down, "moe.ffn_hidden_size", "hidden_size", dim=1),
        stacked_copy(one + "linear_fc2.bias", down + "_bias", "hidden_size"),
    )
