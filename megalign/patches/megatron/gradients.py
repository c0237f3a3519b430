"""Weights' gradients added inside their products (gradient_accumulation_fusion) without Apex."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from megalign import ops
from megalign.patches.megatron.replace import replace


def add_gradients_without_apex() -> None:
    """tensor_parallel/layers.py:924/1070 refuses gradient_accumulation_fusion without Apex's kernel, to the head too.

    Transformer Engine's linears add their gradients up themselves, and the head is a function of its weight here
    (model.heads), no module that is called. Goes when upstream asks where the kernel is used.
    """
    from megatron.core.tensor_parallel import layers

    replace(layers, "_grad_accum_fusion_available", True)


def add_gradients_on_a_cpu() -> None:
    """layers.py:569/680 calls Apex's kernel, for which a product of ours stands in; buffers are fp32
    (model.optimizer)."""
    from megatron.core.tensor_parallel import layers

    def add(given: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        ops.add_product_(main_grad, grad_output.t(), given)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add)
    add_gradients_without_apex()
