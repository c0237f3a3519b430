"""Mistral: Llama with, in its first version, a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import llama
from megalign.conversion.sliding import all_sliding, read_windows

HF_ARCHITECTURE = "MistralForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}  # transformers' defaults here
    return replace(llama.read_config(config), family="mistral", **_windows(config))


def _windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """One for all layers; with layer_types (Ministral) for those that it names, as transformers has it."""
    return read_windows(config, ()) if config.get("layer_types") else all_sliding(config)


rules = llama.rules
