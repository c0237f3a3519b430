"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import llama
from megalign.conversion.rules import QKV, Rule
from megalign.conversion.sliding import qwen_windows

HF_ARCHITECTURE = "Qwen2ForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    return replace(llama.read_config(config), family="qwen2", qkv_bias=True, **qwen_windows(config))


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    bias = QKV.of("decoder.layers.*.self_attention.linear_qkv.bias", "model.layers.*.self_attn.{}_proj.bias")
    return [*llama.rules(architecture), bias]
