"""Qwen3 (dense): Llama with an RMSNorm over each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import llama
from megalign.conversion.rules import Copy, Rule
from megalign.conversion.sliding import qwen_windows

HF_ARCHITECTURE = "Qwen3ForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    # transformers' default here is 128, not hidden_size / num_attention_heads.
    config = {"head_dim": 128, **config}
    return replace(llama.read_config(config), family="qwen3", qk_norm=True, **qwen_windows(config))


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    return [*llama.rules(architecture), *norms_of_heads()]


def norms_of_heads() -> list[Rule]:
    """Those of queries and keys."""
    mcore, hf = "decoder.layers.*.self_attention.", "model.layers.*.self_attn."
    return [Copy.of(f"{mcore}{part}_layernorm.weight", f"{hf}{part}_norm.weight", ("head_dim",)) for part in "qk"]
