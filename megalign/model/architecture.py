"""From a family's Architecture and the layout to Megatron's TransformerConfig."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megalign.conversion.architecture import Architecture
from megalign.model.extensions import TRANSFORMER_ENGINE
from megalign.model.fp8 import fp8
from megalign.model.layer_spec import is_swiglu, transformer_impl
from megalign.model.layout_checks import check_layout
from megalign.model.recomputation import recomputation
from megalign.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from megalign.config import LoopConfig

PARAMS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quick_gelu(gate: Tensor) -> Tensor:
    """Megatron has it compiled; same numbers without."""
    return gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


def transformer_config(architecture: Architecture, args: LoopConfig, groups: ParallelGroups) -> TransformerConfig:
    """Megatron's configuration of the model at this layout; UserError where sizes do not divide."""
    check_layout(architecture, args, groups)
    dtype = PARAMS_DTYPES[args.params_dtype_name]
    implementation = transformer_impl(args, architecture)
    uses_te = implementation == TRANSFORMER_ENGINE
    kind = TransformerConfig if architecture.mla is None else MLATransformerConfig
    config = kind(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[architecture.activation],
        activation_func_clamp_value=architecture.activation_limit,
        glu_linear_offset=architecture.up_offset,
        use_te_activation_func=not uses_te and is_swiglu(architecture),
        layernorm_zero_centered_gamma=architecture.zero_centered_norms,
        softmax_scale=architecture.softmax_scale,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm or architecture.mla is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp.size,
        pipeline_model_parallel_size=groups.pp.size,
        virtual_pipeline_model_parallel_size=args.num_chunks if args.num_chunks > 1 else None,
        num_layers_in_first_pipeline_stage=args.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=args.num_layers_in_last_pipeline_stage,
        # Two messages between the same two ranks would mix in one batch of p2p operations, silently.
        overlap_p2p_comm=args.num_chunks > 1,
        batch_p2p_comm=args.num_chunks == 1,
        context_parallel_size=groups.cp.size,
        # A dense model beside one with experts has the same on every rank.
        expert_model_parallel_size=groups.ep.size if architecture.moe else 1,
        expert_tensor_parallel_size=groups.etp.size if architecture.moe else groups.tp.size,
        sequence_parallel=args.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Weights come from the checkpoint at once: no time for random ones.
        perform_initialization=False,
        # Packed microbatches differ in T; Megatron allows that only with this dispatcher, dense models included.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        transformer_impl=implementation,
        moe_grouped_gemm=uses_te and architecture.moe is not None,
        **recomputation(args, architecture, implementation),
        **fp8(args, architecture, implementation, groups),
        # It notes on the weight itself that its gradient is added already, and what comes back from an offloading
        # hook is another object.
        gradient_accumulation_fusion=not args.activation_offloading,
        **_latent_attention(architecture),
        **_experts(architecture, args),
        # The fused variants are CUDA kernels or torch.compile wrappers; same numbers without.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    # Set late: Megatron refuses it with expert tensor parallelism, where its experts would add their last bias on each
    # rank. Ours add it once (model.experts).
    config.add_bias_linear = architecture.linear_bias
    return config


def _latent_attention(architecture: Architecture) -> dict[str, Any]:
    """The fields of a model with latent attention; Megatron's own rotary module serves it."""
    latent = architecture.mla
    if latent is None:
        return {}
    fields = {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.nope_head_dim,
        "qk_pos_emb_head_dim": latent.rope_head_dim,
        "v_head_dim": latent.value_head_dim,
        "rotary_base": architecture.rotary_base,
    }
    scaling = architecture.rope_scaling
    if scaling is None:
        return {**fields, "rope_type": "rope", "rotary_scaling_factor": 1.0}  # the softmax's scale reads it as well
    yarn = {key: value for key, value in scaling.items() if key not in ("rope_type", "factor")}
    return {**fields, **yarn, "rope_type": "yarn", "rotary_scaling_factor": scaling["factor"]}


def _experts(architecture: Architecture, args: LoopConfig) -> dict[str, Any]:
    """The fields of a model with experts; which of them a token chooses is model.router.TokenRouter's matter."""
    experts = architecture.moe
    if experts is None:
        return {}
    kinds = [architecture.layer_kind(layer) for layer in range(architecture.num_layers)]
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.top_k,
        # Megatron's own load balancing and its limits: TokenRouter has its own, and no token is ever dropped.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": (args.router_aux_loss_coef or 0.0) / max(kinds.count("moe"), 1),
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32" if experts.router_in_fp32 else None,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        # Checkpoints number the layers one by one when they are not all alike.
        "moe_layer_freq": [int(kind == "moe") for kind in kinds] if "dense" in kinds else 1,
    }
