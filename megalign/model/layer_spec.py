"""Which modules a transformer layer is made of: plain torch ones, given to Megatron through its layer spec.

Megatron's own local spec refuses packed sequences, sequence and context parallelism; its norm and its
attention are replaced here, and nothing else. Parameter names stay Megatron's.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn, ones

from megalign.conversion.architecture import Architecture, LayerKind
from megalign.model.attention import PackedAttention
from megalign.model.experts import route_by
from megalign.model.latent_attention import PackedLatentAttention


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) with the constructor that Megatron's layers call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums this gradient over tensor ranks when each saw only its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        # In fp32 and rounded before the weight, as transformers does: bf16 must not round twice.
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.eps).to(hidden.dtype)
        return normed * self.weight


def layer_spec(
    config: TransformerConfig, architecture: Architecture, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its chunk `vp_stage`."""
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[_layer(config, architecture, architecture.layer_kind(layer)) for layer in layers],
        layer_norm=RMSNorm,
    )


def _fused_norms(kind: LayerKind, *, latent: bool) -> dict[str, str]:
    """How checkpoints name the norms that Transformer Engine fuses into the linear behind them."""
    attention = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if latent:
        names = (("q", "q_up"), ("kv", "kv_up"))
        attention = {
            f"self_attention.{norm}_layernorm.": f"self_attention.linear_{up}_proj.layer_norm_" for norm, up in names
        }
    # A router and experts stand behind this norm, and no linear.
    return attention if kind == "moe" else {**attention, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _layer(config: TransformerConfig, architecture: Architecture, kind: LayerKind) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if kind == "moe" else None,
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=architecture.mla is not None,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if kind == "moe":
        route_by(parts.mlp, architecture.moe)
    parts.sharded_state_dict_keys_map = _fused_norms(kind, latent=architecture.mla is not None)
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if architecture.mla is not None:
        parts.self_attention.module = PackedLatentAttention
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
