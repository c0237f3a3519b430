"""FP8 matrix products: from our fields to Megatron's, and what they need of layers, GPU and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megalign.conversion.architecture import Architecture
from megalign.errors import UserError
from megalign.model.layer_spec import TRANSFORMER_ENGINE

if TYPE_CHECKING:
    from megalign.config import LoopConfig

# Transformer Engine's rules: the first compute capability with the recipe's products.
_GPUS = {
    "delayed": ((8, 9), "Ada or Hopper"),
    "tensorwise": ((8, 9), "Ada or Hopper"),
    "blockwise": ((9, 0), "Hopper"),
    "mxfp8": ((10, 0), "Blackwell"),
}


def fp8(args: LoopConfig, architecture: Architecture, implementation: str, tp: int) -> dict[str, Any]:
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
    _check_sizes(args, architecture, tp)
    return {"fp8": args.fp8, "fp8_recipe": recipe}


def _way_out(found: tuple[int, int]) -> str:
    able = [recipe for recipe, (wanted, _) in _GPUS.items() if found >= wanted]
    return f"or one of fp8_recipe {', '.join(able)}" if able else "or drop fp8"


def _check_sizes(args: LoopConfig, architecture: Architecture, tp: int) -> None:
    """Rows and columns of every product are multiples of its unit; the tokens' are ParallelGroups.token_multiple."""
    unit = args.token_unit
    widths = {
        "hidden_size": architecture.hidden_size,
        f"intermediate_size / {tp} tensor-parallel ranks": architecture.ffn_hidden_size // tp,
        f"query heads * head_dim / {tp} tensor-parallel ranks": architecture.query_size // tp,
        f"(query + 2 * key heads) * head_dim / {tp} tensor-parallel ranks": (
            architecture.query_size + 2 * architecture.kv_size
        )
        // tp,
    }
    for name, width in widths.items():
        if width % unit:
            raise UserError(
                f"{name} is {width}, and FP8 products need a multiple of {unit}; use a smaller "
                "tensor_model_parallel_size, or drop fp8"
            )
