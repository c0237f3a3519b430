"""FP8 matrix products: from our fields to Megatron's, and what they need of layers, GPU and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from megalign.conversion.architecture import Architecture
from megalign.errors import UserError
from megalign.model.extensions import TRANSFORMER_ENGINE
from megalign.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from megalign.config import LoopConfig

# Transformer Engine's rules: the first compute capability with the recipe's products.
_GPUS = {
    "delayed": ((8, 9), "Ada or Hopper"),
    "tensorwise": ((8, 9), "Ada or Hopper"),
    "blockwise": ((9, 0), "Hopper"),
    "mxfp8": ((10, 0), "Blackwell"),
}


def fp8(args: LoopConfig, architecture: Architecture, implementation: str, groups: ParallelGroups) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig; UserError where FP8 cannot run."""
    if args.fp8 is None:
        return {}
    recipe = args.fp8_scaling
    if implementation != TRANSFORMER_ENGINE:
        raise UserError(
            f"fp8={args.fp8!r} needs Transformer Engine's layers, and these are plain torch; install Transformer "
            "Engine on a GPU machine and leave transformer_impl='auto', or drop fp8"
        )
    if args.params_dtype_name != "bfloat16":
        raise UserError(f"fp8={args.fp8!r} is FP8 within a bfloat16 model, and this one is fp32; set bf16=True")
    wanted, name = _GPUS[recipe]
    found = torch.cuda.get_device_capability()
    if found < wanted:
        raise UserError(
            f"fp8_recipe={recipe!r} needs compute capability {wanted[0]}.{wanted[1]} ({name}) or above, and this GPU "
            f"has {found[0]}.{found[1]}; use a newer GPU, {_way_out(found)}"
        )
    _check_sizes(args, architecture, groups)
    return {"fp8": args.fp8, "fp8_recipe": recipe}


def _way_out(found: tuple[int, int]) -> str:
    able = [recipe for recipe, (wanted, _) in _GPUS.items() if found >= wanted]
    return f"or one of fp8_recipe {', '.join(able)}" if able else "or drop fp8"


def _check_sizes(args: LoopConfig, architecture: Architecture, groups: ParallelGroups) -> None:
    """Rows and columns of every product are multiples of its unit; the tokens' are ParallelGroups.token_multiple."""
    unit = args.token_unit
    for name, size, axis, field in _widths(architecture, groups):
        width = size // axis
        if width % unit:
            width_of = name if axis == 1 else f"{name} / {axis} tensor-parallel ranks"
            way_out = "drop fp8" if axis == 1 else f"use a smaller {field}, or drop fp8"
            raise UserError(f"{width_of} is {width}, and FP8 products need a multiple of {unit}; {way_out}")


def _widths(architecture: Architecture, groups: ParallelGroups) -> Iterator[tuple[str, int, int, str]]:
    """(name, size, over how many ranks, by which field) of all that a layer's linears make or read; routers are not
    in FP8."""
    whole = (1, "")
    over_tp = (groups.tp.size, "tensor_model_parallel_size")
    yield "hidden_size", architecture.hidden_size, *whole
    latent = architecture.mla
    if latent is None:
        yield "query heads * head_dim", architecture.query_size, *over_tp
        yield "(query + 2 * key heads) * head_dim", architecture.qkv_size, *over_tp
    else:
        if latent.q_lora_rank is not None:
            yield "q_lora_rank", latent.q_lora_rank, *whole
        yield "kv_lora_rank", latent.kv_lora_rank, *whole
        yield "kv_lora_rank + qk_rope_head_dim", latent.down_size, *whole
        yield "heads * (qk_nope_head_dim + qk_rope_head_dim)", latent.query_size, *over_tp
        yield "heads * (qk_nope_head_dim + v_head_dim)", latent.up_size, *over_tp
        yield "heads * v_head_dim", latent.value_size, *over_tp
    if any(architecture.layer_kind(layer) == "dense" for layer in range(architecture.num_layers)):
        yield "intermediate_size", architecture.ffn_hidden_size, *over_tp
    experts = architecture.moe
    if experts is not None:
        yield "the experts' intermediate size", experts.ffn_hidden_size, groups.etp.size, "expert_tensor_parallel_size"
        if experts.shared_ffn_hidden_size is not None:
            yield "the shared expert's intermediate size", experts.shared_ffn_hidden_size, *over_tp
