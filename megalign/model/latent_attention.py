"""Multi-head latent attention on packed sequences with tensor, sequence and context parallelism in plain torch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, empty, nn

LATENT_EPSILON = 1e-6  # transformers', whatever rms_norm_eps is


class WholeLinear(nn.Module):
    """The weight [rows, columns], whole on every tensor rank, as Transformer Engine's "duplicated" linear has it."""

    def __init__(self, config: TransformerConfig, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty(rows, columns, dtype=config.params_dtype))
        # Megatron sums this gradient over tensor ranks when each saw only its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return F.linear(hidden, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight as Megatron's checkpoints describe a replicated tensor."""
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {}, sharded_offsets)


class PackedLatentAttention(MLASelfAttention):
    """Megatron's, with down projections that each tensor rank applies to its own tokens.

    Its plain spec splits them over the tensor ranks and gathers their outputs with a backward that keeps each rank's
    slice (multi_latent_attention.py:580, 0.16.1), but the keys' rotary part has a gradient from every rank's heads.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        down = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(config, down, config.hidden_size)
        self.kv_layernorm.eps = LATENT_EPSILON
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.q_lora_rank, config.hidden_size)
            self.q_layernorm.eps = LATENT_EPSILON

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """What the spec says. 0.19.2's own rules (mla_qk_norm_config.py:62) fuse a norm into the queries' projection
        where there is no latent of queries; 0.16.1 does not ask."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}
