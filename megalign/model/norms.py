"""Root-mean-square norms (arXiv 1910.07467) with the constructors that Megatron's layers call."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn, ones

from megalign import ops


class RMSNorm(nn.Module):
    """normed * weight, or with the config's layernorm_zero_centered_gamma normed * (1 + weight)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums this gradient over tensor ranks when each saw only its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return ops.rms_norm(hidden, self.weight, eps=self.eps, zero_centered=self.zero_centered)


class NormedRowParallelLinear(RowParallelLinear):
    """The last linear of attention or feed-forward part with a norm behind it, before the residual is added.

    The norm sees the sum over tensor ranks, with sequence parallelism of this rank's tokens.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        assert self.bias is None, "Megatron would add the bias behind the norm"
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        output, _ = super().forward(input_)
        return self.post_layernorm(output), None
