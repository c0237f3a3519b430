"""Causal attention inside each sequence of a packed batch, on torch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megalign.batch import Batch


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed-sequence parameters, with the lengths on the host so that no layer waits for the device."""

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: Batch) -> PackedSequences:
        """The parameters of a Batch; `max_seqlen` is the true longest sequence (rope restarts at each)."""
        lengths = tuple(batch.cu_seqlens.diff().tolist())
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=lengths,
        )


class PackedAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v within each sequence; grouped queries without repeating keys."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any
    ) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,  # [T, heads, head_dim]
        key: Tensor,  # [T, groups, head_dim]
        value: Tensor,  # [T, groups, head_dim]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> Tensor:
        assert packed_seq_params is not None, "every batch is packed"
        dtype, lengths = query.dtype, list(packed_seq_params.lengths)
        if not query.is_cuda and dtype is torch.bfloat16:
            # torch's CPU kernel takes 3.5 times as long for bf16's backward as for fp32's.
            query, key, value = query.float(), key.float(), value.float()
        parts = [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in qkv), is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )[0].transpose(0, 1)
            for qkv in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(parts).flatten(1).to(dtype)
