"""Parts of a layer in plain torch, with the constructors that Megatron's layers call; parameter names are Megatron's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn, ones


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums this gradient over tensor ranks when each saw only its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        # In fp32 and rounded before the weight, as transformers does: bf16 must not round twice.
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.eps).to(hidden.dtype)
        return normed * self.weight
