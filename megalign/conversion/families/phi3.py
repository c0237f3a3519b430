"""Phi-3, Phi-3.5 mini and Phi-4: Llama with fused projections, LongRoPE, a window and partly rotated heads.

Past original_max_position_embeddings a sequence takes the long factors, whole, as in transformers. vLLM takes them for
every sequence or for none (see rollout.vllm_model.check_rope).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import llama
from megalign.conversion.fused import fuse
from megalign.conversion.rope import without_partial_rotary
from megalign.conversion.rules import Rule
from megalign.conversion.sliding import all_sliding
from megalign.errors import UserError

HF_ARCHITECTURE = "Phi3ForCausalLM"


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The content of a config.json -> Architecture."""
    if config.get("resid_pdrop"):
        raise UserError(f"config.json's resid_pdrop={config['resid_pdrop']!r} is not supported; only 0.0 is")
    config, rotary_percent = without_partial_rotary(_with_longrope_name(config), 1.0)
    read = replace(
        llama.read_config(config),
        family="phi3",
        rotary_percent=rotary_percent,
        pad_token_id=32000,
        **all_sliding(config),
    )
    for name in ("short_factor", "long_factor"):
        factors = (read.rope_scaling or {}).get(name, ())
        if factors and len(factors) != read.rotary_dim // 2:
            raise UserError(
                f"{name} in config.json has {len(factors)} numbers, but {read.rotary_dim} dims of a head are rotated; "
                f"it must have {read.rotary_dim // 2}"
            )
    return read


def rules(architecture: Architecture) -> list[Rule]:
    """Every tensor of the model."""
    mcore, hf = "decoder.layers.*.", "model.layers.*."
    found = llama.rules(architecture)
    found = fuse(found, f"{mcore}self_attention.linear_qkv.weight", f"{hf}self_attn.qkv_proj.weight", "qkv_size")
    return fuse(found, f"{mcore}mlp.linear_fc1.weight", f"{hf}mlp.gate_up_proj.weight", "gate_up_size")


def _with_longrope_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """Older files say su or yarn; the original length is beside the rope's parameters, 4096 by default."""
    config = {"original_max_position_embeddings": 4096, **config}
    for name in ("rope_parameters", "rope_scaling"):
        rope = dict(config.get(name) or {})
        kind = rope.pop("type", None)
        kind = rope.get("rope_type") or kind
        if kind is not None:
            config[name] = {**rope, "rope_type": "longrope" if kind in ("su", "yarn") else kind}
    return config
