"""The experts' linears and the marks on their weights, for any layout of tensor and expert parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import Tensor, nn


class ExpertRowParallelLinear(RowParallelLinear):
    """The last linear of an expert, whose bias counts once where ranks share its matrices.

    Megatron's MLP adds the bias to each rank's part of a sum.
    """

    def __init__(self, *sizes: int, **kwargs: Any) -> None:
        super().__init__(*sizes, **kwargs)
        # Else an output of one rank comes back from its collective as it went in, and autograd forbids the MLP to add
        # the bias in place (layers.py:1289, mlp.py:247 of 0.16.1).
        self.explicit_expert_comm = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        if bias is None or self.tp_group.size() == 1:
            return output, bias
        return output, _OfFirstRank.apply(bias, self.tp_group.rank() == 0)


class _OfFirstRank(torch.autograd.Function):
    """Zero on the other ranks. All have the gradient of the sum, and so the parameter's, without communication."""

    @staticmethod
    def forward(ctx, bias, is_first):  # noqa: ANN001, ANN205
        return bias.clone() if is_first else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return grad, None


def mark_experts(model: nn.Module) -> None:
    """Their gradients are summed over the ranks that hold the same part of the same expert.

    Megatron (tensor_parallel/layers.py:866, 0.16.1) says so with expert_model_parallel_size above 1 only; with an
    expert_tensor_parallel_size of its own, replicas of an expert would go apart. It also sums the gradients of last
    biases over tensor ranks, as of a linear that each rank gives a part of the tokens (:1228), and counts them in the
    gradient's norm on tensor rank 0 alone: the first rank that shares an expert must, wherever it is.
    """
    for module in model.modules():
        if isinstance(module, SequentialMLP | TEGroupedMLP):
            for parameter in module.parameters():
                parameter.allreduce = False
                parameter.sequence_parallel = False
        if isinstance(module, ExpertRowParallelLinear) and module.bias is not None:
            is_first = module.tp_group.rank() == 0
            module.bias.tensor_model_parallel, module.bias.shared = is_first, not is_first
