"""Gemma 3's text models: Gemma 2 with normed queries and keys instead of caps, and a rotary base of windowed layers.

Models with a vision tower (Gemma3ForConditionalGeneration, 4B and larger) are another architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import gemma2, qwen3
from megalign.conversion.rules import Rule
from megalign.conversion.sliding import FULL, SLIDING
from megalign.errors import UserError

HF_ARCHITECTURE = "Gemma3ForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    if config.get("attn_logit_softcapping") is not None:  # which transformers reads and does not apply
        raise UserError("config.json's attn_logit_softcapping is not supported for Gemma 3; remove it")
    pattern = config.get("sliding_window_pattern") or 6
    types = [SLIDING if (layer + 1) % pattern else FULL for layer in range(config.get("num_hidden_layers") or 0)]
    config, local_base = _split_rope(config)
    read = gemma2.read_gemma(config, types)
    return replace(read, family="gemma3_text", qk_norm=True, local_rotary_base=local_base)


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    return [*gemma2.rules(architecture), *qwen3.norms_of_heads()]


def _split_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The config with the rope of its full layers as the only one, and the base of its windowed layers.

    transformers 5 nests both in rope_parameters; older files have rope_theta, rope_scaling, rope_local_base_freq.
    """
    nested = config.get("rope_parameters") or {}
    local = nested.get(SLIDING) or {}
    if local.get("rope_type", "default") != "default":
        raise UserError(
            f"rope_type {local['rope_type']!r} of {SLIDING} layers in config.json is not supported; only 'default' is"
        )
    full = {**(nested.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    full.setdefault("rope_theta", config.get("rope_theta") or 1_000_000.0)
    base = local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0
    return {**config, "rope_parameters": full, "rope_scaling": None}, float(base)
