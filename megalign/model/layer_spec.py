"""Which modules a transformer layer is made of: plain torch ones, given to Megatron through its layer spec.

Megatron's own local spec refuses packed sequences, sequence and context parallelism; its norm and its
attention are replaced here, and nothing else. Parameter names stay Megatron's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megalign.conversion.architecture import Architecture
from megalign.model.attention import PackedAttention
from megalign.model.norms import NormedRowParallelLinear, RMSNorm
from megalign.model.rotary import Rotary


def layer_spec(
    config: TransformerConfig, architecture: Architecture, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its chunk `vp_stage`."""
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[_layer(config, architecture, layer) for layer in layers], layer_norm=RMSNorm
    )


def _layer(config: TransformerConfig, architecture: Architecture, number: int) -> ModuleSpec:
    """The (global) layer `number`."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if architecture.layer_kind(number) == "moe" else None,
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = partial(
        PackedAttention,
        rotary=Rotary.of(architecture, number),
        window=architecture.window(number),
        softcap=architecture.attention_softcap,
    )
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if architecture.sandwich_norms:
        attention.linear_proj = _submodules(parts.mlp).linear_fc2 = NormedRowParallelLinear
    return layer


def _submodules(spec: Any) -> Any:
    """The parts of a module, which 0.19 describes by a partial and 0.16 by a ModuleSpec."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
