"""Transformer Engine's attention behind our rotary embedding; imported only where Transformer Engine is used."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megalign.model.attention import PackedSequences
from megalign.model.rotary import Rotary


class RotatedAttention(TEDotProductAttention):
    """TEDotProductAttention whose queries and keys are rotated first, as PackedAttention does it."""

    def __init__(self, *args: Any, rotary: Rotary, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary = rotary

    def forward(
        self,
        query: Tensor,  # [T / cp, heads, head_dim]
        key: Tensor,  # [T / cp, groups, head_dim]
        value: Tensor,  # [T / cp, groups, head_dim]
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSequences,
        **kwargs: Any,
    ) -> Tensor:
        query, key = self.rotary(query, key, packed_seq_params)
        return super().forward(query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs)
