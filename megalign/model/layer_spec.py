"""Which modules a transformer layer is made of, chosen here only: Transformer Engine's, or plain torch ones.

Megatron's own local spec refuses packed sequences, sequence and context parallelism; its norm and its
attention are replaced here, and nothing else. Checkpoints have the same names whichever spec wrote them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megalign.conversion.architecture import Architecture, LayerKind
from megalign.errors import UserError
from megalign.model.activations import SwiGLU
from megalign.model.attention import PackedAttention
from megalign.model.experts import ExpertRowParallelLinear
from megalign.model.extensions import LOCAL, TRANSFORMER_ENGINE, has_transformer_engine
from megalign.model.latent_attention import LATENT_EPSILON, PackedLatentAttention
from megalign.model.norms import NormedRowParallelLinear, RMSNorm
from megalign.model.rotary import Rotary
from megalign.model.router import TokenRouter

if TYPE_CHECKING:
    from megalign.config import LoopConfig


def transformer_impl(args: LoopConfig, architecture: Architecture) -> str:
    """`args.transformer_impl`, "auto" resolved: Transformer Engine on a GPU, where it has what the model needs."""
    lacks = not_in_transformer_engine(architecture)
    if args.transformer_impl == "auto":
        return TRANSFORMER_ENGINE if has_transformer_engine() and not lacks else LOCAL
    if args.transformer_impl == TRANSFORMER_ENGINE and lacks:
        raise UserError(
            f"transformer_impl='transformer_engine' has no {' and no '.join(lacks)}, which {architecture.family} "
            "needs; use 'local' or 'auto'"
        )
    if args.transformer_impl == TRANSFORMER_ENGINE and not has_transformer_engine():
        missing = "a GPU, and torch sees none" if HAVE_TE else "Transformer Engine, which cannot be imported"
        way_out = "run it on a GPU" if HAVE_TE else "install it (pip install --no-build-isolation transformer-engine)"
        raise UserError(f"transformer_impl='transformer_engine' needs {missing}; {way_out}, or use 'local'")
    return args.transformer_impl


def not_in_transformer_engine(architecture: Architecture) -> list[str]:
    """What the model needs and only the plain layers have, each after 'no' or 'a'."""
    needs = {
        "sliding window that differs by layer": architecture.sliding_layers,
        "cap on attention scores": architecture.attention_softcap,
        "sink in attention": architecture.attention_sinks,
        "norm behind attention and feed-forward part": architecture.sandwich_norms,
        # 0.19.2 would give the queries' projection a norm that the model has not.
        "latent attention without a latent of queries": architecture.mla and architecture.mla.q_lora_rank is None,
        "norm epsilon of latent attention alone": architecture.mla and architecture.norm_epsilon != LATENT_EPSILON,
    }
    return [name for name, needed in needs.items() if needed]


def not_sharing_prefixes(config: TransformerConfig, architecture: Architecture) -> str | None:
    """What keeps tokens that sequences begin with from being computed once; None where nothing does.

    The hidden state of a token has to depend on the tokens before it alone, and the layers to take fewer queries than
    keys: latent attention and Transformer Engine rotate by places in whole sequences.
    """
    reasons = {
        "context parallelism": config.context_parallel_size > 1,
        "Transformer Engine's layers": config.transformer_impl == TRANSFORMER_ENGINE,
        "latent attention": architecture.mla is not None,
        # All of a long sequence is rotated apart.
        "LongRoPE": (architecture.rope_scaling or {}).get("rope_type") == "longrope",
        # A mean over tokens, each in every sequence that has it.
        "router_aux_loss_coef": config.moe_aux_loss_coeff,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def is_swiglu(architecture: Architecture) -> bool:
    """Whether a feed-forward part has silu(gate) * up between its linears, and nothing else."""
    return architecture.activation == "silu" and architecture.activation_limit is None and not architecture.up_offset


def layer_spec(
    config: TransformerConfig, architecture: Architecture, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its chunk `vp_stage`."""
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    uses_te = config.transformer_impl == TRANSFORMER_ENGINE
    layer = _transformer_engine_layer if uses_te else _local_layer
    return TransformerBlockSubmodules(
        layer_specs=[layer(config, architecture, number) for number in layers],
        layer_norm=TENorm if uses_te else RMSNorm,
    )


def _transformer_engine_layer(config: TransformerConfig, architecture: Architecture, number: int) -> ModuleSpec:
    """Its norms, fused attention, linears with the norm before them, and grouped experts; the (global) layer."""
    from megalign.model.te_attention import RotatedAttention  # exists only where Transformer Engine does

    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if architecture.layer_kind(number) == "moe" else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if architecture.layer_kind(number) == "moe":
        _submodules(layer.submodules.mlp).router = partial(TokenRouter, experts=architecture.moe)
    if architecture.mla is None:  # latent attention rotates itself
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = partial(RotatedAttention, rotary=Rotary.of(architecture, number))
    return layer


def _local_layer(config: TransformerConfig, architecture: Architecture, number: int) -> ModuleSpec:
    """The (global) layer `number`."""
    kind = architecture.layer_kind(number)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if kind == "moe" else None,
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=architecture.mla is not None,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if kind == "moe":
        _submodules(parts.mlp).router = partial(TokenRouter, experts=architecture.moe)
        if architecture.linear_bias:
            _submodules(_submodules(parts.mlp).experts).linear_fc2 = ExpertRowParallelLinear
    if config.use_te_activation_func:
        for feed_forward in _feed_forward_parts(parts.mlp, kind):
            feed_forward.activation_func = SwiGLU
    parts.sharded_state_dict_keys_map = fused_norms(config, kind)
    attention = parts.self_attention.submodules
    if architecture.mla is not None:  # it rotates a part of its heads itself
        parts.self_attention.module = PackedLatentAttention
        attention.core_attention = PackedAttention
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
        return layer
    attention.core_attention = partial(
        PackedAttention,
        rotary=Rotary.of(architecture, number),
        window=architecture.window(number),
        softcap=architecture.attention_softcap,
        sinks=architecture.attention_sinks,
    )
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if architecture.sandwich_norms:
        attention.linear_proj = _submodules(parts.mlp).linear_fc2 = NormedRowParallelLinear
    return layer


def _submodules(spec: Any) -> Any:
    """The parts of a module, which 0.19 describes by a partial and 0.16 by a ModuleSpec."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def _feed_forward_parts(mlp: Any, kind: LayerKind) -> list[Any]:
    """The parts of the layer's MLP, or of its experts and what stands beside them for all tokens."""
    parts = _submodules(mlp)
    return [parts] if kind == "dense" else [_submodules(parts.experts), _submodules(parts.shared_experts)]


def fused_norms(config: TransformerConfig, kind: LayerKind) -> dict[str, str]:
    """A plain layer's norms that Transformer Engine's spec fuses into the linear behind them: name -> its name there.

    Upstream's own table renames the norm before a router as well, which Transformer Engine's spec leaves alone.
    """
    attention = "self_attention."
    if not config.multi_latent_attention:
        names = {"input_layernorm.": f"{attention}linear_qkv.layer_norm_"}
    elif config.qk_layernorm:
        names = {
            f"{attention}{part}_layernorm.": f"{attention}linear_{part}_up_proj.layer_norm_" for part in ("q", "kv")
        }
    else:
        names = {}
    return names if kind == "moe" else names | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
