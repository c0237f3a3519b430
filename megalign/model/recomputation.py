"""Which activations the backward pass computes again: from our fields to Megatron's, and what does not go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megalign.conversion.architecture import Architecture
from megalign.errors import UserError
from megalign.model.extensions import TRANSFORMER_ENGINE

if TYPE_CHECKING:
    from megalign.config import LoopConfig

# Modules that not every model has: the test, and what it asks for. Megatron itself recomputes nothing, in silence.
_NEEDS: Mapping[str, tuple[Callable[[Architecture], bool], str]] = {
    "mlp": (lambda model: any(model.layer_kind(n) == "dense" for n in range(model.num_layers)), "a dense layer"),
    "moe": (lambda model: model.moe is not None, "experts"),
    "moe_act": (lambda model: model.moe is not None, "experts"),
    "shared_experts": (
        lambda model: model.moe is not None and model.moe.shared_ffn_hidden_size is not None,
        "a shared expert",
    ),
    "mla_up_proj": (lambda model: model.mla is not None, "multi-head latent attention"),
}


def recomputation(args: LoopConfig, architecture: Architecture, implementation: str) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig; UserError for what this model or these layers do not have."""
    if not args.gradient_checkpointing:
        return {}
    if args.recompute_granularity == "full":
        method, layers = args.recompute_method or "uniform", args.recompute_num_layers or 1
        _check_layers(method, layers, architecture, args)
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    modules = args.recompute_modules or ["core_attn"]
    for module in modules:
        _check_module(module, args, architecture, implementation)
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def _check_layers(method: str, layers: int, architecture: Architecture, args: LoopConfig) -> None:
    for held in _layers_of_chunks(architecture.num_layers, args):
        if method == "uniform" and held % layers:
            raise UserError(
                f"recompute_num_layers={layers} does not divide the {held} layers of a pipeline stage or chunk into "
                "units; use a number that does, or recompute_method='block'"
            )
        if layers > held:
            raise UserError(
                f"recompute_num_layers={layers} is more than the {held} layers of a pipeline stage or chunk; use "
                f"{held} at most"
            )


def _layers_of_chunks(num_layers: int, args: LoopConfig) -> set[int]:
    """How many layers the chunks of stages hold; they divide evenly (layout_checks.check_layout)."""
    ends = (args.num_layers_in_first_pipeline_stage, args.num_layers_in_last_pipeline_stage)
    stages = [layers for layers in ends if layers is not None]
    others = args.pipeline_model_parallel_size - len(stages)
    if others:
        stages.append((num_layers - sum(stages)) // others)
    return {layers // args.num_chunks for layers in stages}


def _check_module(module: str, args: LoopConfig, architecture: Architecture, implementation: str) -> None:
    has, what = _NEEDS.get(module, (lambda _: True, ""))
    uses_te = implementation == TRANSFORMER_ENGINE
    if not has(architecture):
        raise UserError(
            f"recompute_modules has {module!r}, which needs {what}, and a {architecture.family} model like this has "
            "none; drop it"
        )
    if module == "moe_act" and not uses_te:
        raise UserError(
            "recompute_modules has 'moe_act', which recomputes in Transformer Engine's grouped experts only, and "
            "these layers are plain torch; use 'moe', which recomputes the experts whole"
        )
    if module == "layernorm" and uses_te and architecture.moe is None:
        raise UserError(
            "recompute_modules has 'layernorm', and Transformer Engine's linears of a dense model recompute their "
            "norm themselves; drop it"
        )
    if module in ("layernorm", "moe_act") and args.fp8 is not None and args.fp8_scaling == "delayed":
        raise UserError(
            f"recompute_modules has {module!r}, which FP8's delayed scaling cannot recompute (Megatron-Core's rule); "
            "set another fp8_recipe, or drop it"
        )
