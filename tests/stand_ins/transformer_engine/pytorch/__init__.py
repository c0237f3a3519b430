"""The modules, with the arguments that Megatron gives them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fp8  # noqa: F401


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def _shard(rows: int, columns: int, parallel_mode: str | None, tp_size: int) -> nn.Parameter:
    rows, columns = rows // tp_size ** (parallel_mode == "column"), columns // tp_size ** (parallel_mode == "row")
    weight = nn.Parameter(torch.empty(rows, columns))
    # Every weight, whole ones too, as Transformer Engine does.
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, int(parallel_mode == "row"), 1
    return weight


class Linear(nn.Module):
    """One rank's matrix."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, parallel_mode: str | None, tp_size: int = 1, **_: Any
    ) -> None:
        super().__init__()
        self.weight = _shard(out_features, in_features, parallel_mode, tp_size)
        self.bias = nn.Parameter(torch.empty(len(self.weight))) if bias else None

    def forward(self, hidden: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class LayerNormLinear(Linear):
    """A norm and the matrix behind it."""

    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str, **rest: Any) -> None:
        assert normalization == "RMSNorm"
        super().__init__(in_features, out_features, **rest)
        self.layer_norm_weight, self.eps = nn.Parameter(torch.ones(in_features)), eps

    def forward(self, hidden: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(F.rms_norm(hidden, hidden.shape[-1:], self.layer_norm_weight, self.eps))


class RMSNorm(nn.Module):
    """The norm alone."""

    def __init__(self, hidden_size: int, *, eps: float, **_: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Never made here."""


class GroupedLinear(nn.Module):
    """A matrix an expert."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, parallel_mode: str | None,
        tp_size: int = 1, **_: Any,
    ) -> None:  # fmt: skip
        assert not bias
        super().__init__()
        for number in range(num_gemms):
            setattr(self, f"weight{number}", _shard(out_features, in_features, parallel_mode, tp_size))

    def forward(self, hidden: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Tensor:
        parts = hidden.split([int(size) for size in m_splits])
        return torch.cat([F.linear(part, getattr(self, f"weight{number}")) for number, part in enumerate(parts)])


class DotProductAttention(nn.Module):
    """Causal within each packed sequence."""

    def __init__(
        self, num_attention_heads: int, kv_channels: Any, *, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, attn_mask_type: str, qkv_format: str,
        cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int, max_seqlen_kv: int, **rest: Any,
    ) -> Tensor:  # fmt: skip
        assert attn_mask_type == "padding_causal" and qkv_format == "thd" and not any(rest.values()), rest
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(heads.transpose(0, 1).split(lengths, 1) for heads in (query, key, value)), strict=True)
        attended = [
            F.scaled_dot_product_attention(*p, is_causal=True, scale=self.scale, enable_gqa=True) for p in parts
        ]
        return torch.cat(attended, 1).transpose(0, 1).flatten(1)


class CudaRNGStatesTracker:
    """Megatron derives its own from it."""
