"""What a config.json says about rotary embeddings -> the fields of an Architecture; the choices are transformers'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megalign.errors import UserError

_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rotary_base and rope_scaling. transformers 5 writes rope_parameters, older versions rope_theta, rope_scaling."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        factor = rope["partial_rotary_factor"]
        raise UserError(f"partial_rotary_factor={factor} is not supported by this family; only 1.0 is")
    return {"rotary_base": base, "rope_scaling": _read_scaling(rope, config)}


def without_partial_rotary(config: Mapping[str, Any], default: float) -> tuple[dict[str, Any], float]:
    """For the families that rotate a part of each head: the config without its partial_rotary_factor, and that."""
    config = dict(config)
    # The nested one counts, as transformers only fills it in from outside.
    found = [config.pop("partial_rotary_factor", None)]
    for name in ("rope_parameters", "rope_scaling"):
        if config.get(name):
            config[name] = dict(config[name])
            found.insert(0, config[name].pop("partial_rotary_factor", None))
    return config, next((factor for factor in found if factor is not None), default)


def _read_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in _REQUIRED:
        kinds = ", ".join(("default", *_REQUIRED))
        raise UserError(f"rope_type {kind!r} in config.json is not supported; megalign has {kinds}")
    missing = [key for key in _REQUIRED[kind] if rope.get(key) is None]
    if missing:
        raise UserError(f"rope_type {kind!r} in config.json lacks {', '.join(missing)}; add them")
    scaling = {"rope_type": kind, **{key: rope[key] for key in _REQUIRED[kind]}}
    if kind == "linear":
        return scaling
    # The one outside, where there is one, has precedence.
    longest = config["max_position_embeddings"]
    nested = rope.get("original_max_position_embeddings") or longest
    original = scaling["original_max_position_embeddings"] = config.get("original_max_position_embeddings") or nested
    if kind == "yarn":
        return scaling | {
            "beta_fast": rope.get("beta_fast") or 32,
            "beta_slow": rope.get("beta_slow") or 1,
            "truncate": rope.get("truncate", True),
            "attention_factor": _yarn_attention_factor(rope),
        }
    if kind == "longrope":
        return scaling | {"attention_factor": _longrope_attention_factor(rope, longest / original, original)}
    return scaling


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by, with YaRN."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_growth(rope["factor"], rope["mscale"]) / yarn_growth(rope["factor"], rope["mscale_all_dim"])
    return yarn_growth(rope["factor"], 1.0)


def yarn_growth(factor: float, weight: float) -> float:
    """YaRN, arXiv 2309.00071 eq. 22: the magnitude at this extension, with a weight of its logarithm."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope_attention_factor(rope: Mapping[str, Any], extension: float, original: int) -> float:
    """LongRoPE, arXiv 2402.13753; what cos and sin are multiplied by, at every length."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = extension if rope.get("factor") is None else rope["factor"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
