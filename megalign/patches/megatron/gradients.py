"""Weights' gradients added inside their products (gradient_accumulation_fusion) without Apex."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from megalign import ops
from megalign.device import on_cuda
from megalign.patches.megatron.replace import replace


def add_gradients_without_apex() -> None:
    """tensor_parallel/layers.py:569/680 calls Apex's kernel, for which a product of ours stands in where it is not
    built, and on a CPU; buffers are fp32 (model.optimizer).

    layers.py:924/1070 refuses gradient_accumulation_fusion without the kernel also where nothing would call it: to
    Transformer Engine's linears, and to the head, a function of its weight here (model.heads).
    """
    from megatron.core.tensor_parallel import layers

    def add(given: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        ops.add_product_(main_grad, grad_output.t(), given)

    if not (on_cuda() and layers._grad_accum_fusion_available):
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add)
    replace(layers, "_grad_accum_fusion_available", True)
