"""UserError where a model's sizes do not divide by the layout, or a layout is no use to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalign.conversion.architecture import Architecture
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from megalign.config import LoopConfig


def check_policy(architecture: Architecture, args: LoopConfig, groups: ParallelGroups) -> None:
    """check_layout, and that what is said of experts is of use; a reward model beside it may have none."""
    check_layout(architecture, args, groups)
    if architecture.moe is not None:
        return
    ep, etp = groups.ep.size, groups.etp.size
    if ep > 1 or etp != groups.tp.size:
        raise UserError(
            f"{architecture.family} has no experts, so expert_model_parallel_size {ep} and "
            f"expert_tensor_parallel_size {etp} split nothing; drop them"
        )
    if args.router_aux_loss_coef:
        raise UserError(
            f"router_aux_loss_coef={args.router_aux_loss_coef} balances the experts of a model, and "
            f"{architecture.family} has none; drop it"
        )


def check_layout(architecture: Architecture, args: LoopConfig, groups: ParallelGroups) -> None:
    """UserError when heads, FFN, layers or experts do not divide by the layout."""
    tp = groups.tp.size
    if architecture.num_attention_heads % tp:
        fits = [n for n in range(1, architecture.num_attention_heads + 1) if architecture.num_attention_heads % n == 0]
        raise UserError(
            f"num_attention_heads {architecture.num_attention_heads} is not divisible by "
            f"tensor_model_parallel_size {tp}; use one of {fits}"
        )
    has_dense = any(architecture.layer_kind(layer) == "dense" for layer in range(architecture.num_layers))
    if has_dense and architecture.ffn_hidden_size % tp:
        raise UserError(
            f"intermediate_size {architecture.ffn_hidden_size} is not divisible by tensor_model_parallel_size {tp}; "
            "use a smaller tensor_model_parallel_size"
        )
    groups_of_kv = architecture.num_query_groups
    if groups_of_kv % tp and tp % groups_of_kv:
        raise UserError(
            f"num_key_value_heads {groups_of_kv} and tensor_model_parallel_size {tp} do not divide one another; "
            "use a tensor_model_parallel_size that divides it or is a multiple of it"
        )
    _check_stages(architecture.num_layers, args)
    _check_experts(architecture, args, groups)


def _check_stages(num_layers: int, args: LoopConfig) -> None:
    ends = (args.num_layers_in_first_pipeline_stage, args.num_layers_in_last_pipeline_stage)
    given = [layers for layers in ends if layers is not None]
    rest, stages = num_layers - sum(given), args.pipeline_model_parallel_size - len(given)
    middle = "stages" if not given else "other stages"
    if rest < stages or (rest % stages if stages else rest):
        raise UserError(
            f"num_hidden_layers {num_layers} at pipeline_model_parallel_size {args.pipeline_model_parallel_size} "
            f"leaves {rest} layers for {stages} {middle}, which must share them evenly; "
            "use a pipeline_model_parallel_size that divides it, or set num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage"
        )
    chunks = args.num_chunks
    for layers in [*given, *([rest // stages] if stages else [])]:
        if layers % chunks:
            raise UserError(
                f"a pipeline stage of {layers} layers cannot be cut into virtual_pipeline_model_parallel_size {chunks} "
                "equal chunks; use a size that divides it"
            )


def _check_experts(architecture: Architecture, args: LoopConfig, groups: ParallelGroups) -> None:
    ep, etp, experts = groups.ep.size, groups.etp.size, architecture.num_experts
    if architecture.moe is None:
        return
    if groups.tp.size > 1 and not args.sequence_parallel:
        raise UserError(
            f"{architecture.family} has experts, and with tensor_model_parallel_size {groups.tp.size} every rank would "
            "send them every token; set sequence_parallel=True, which gives each rank its part of the tokens"
        )
    if experts % ep:
        raise UserError(
            f"{experts} experts are not divisible by expert_model_parallel_size {ep}; use a size that divides them"
        )
    if architecture.moe.ffn_hidden_size % etp:
        raise UserError(
            f"the experts' intermediate size {architecture.moe.ffn_hidden_size} is not divisible by "
            f"expert_tensor_parallel_size {etp}; use a smaller one"
        )
    shared = architecture.moe.shared_ffn_hidden_size
    if shared is not None and shared % groups.tp.size:
        raise UserError(
            f"the shared expert's intermediate size {shared} is not divisible by tensor_model_parallel_size "
            f"{groups.tp.size}; use a smaller one"
        )
