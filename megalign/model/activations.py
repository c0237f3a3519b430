"""The activation of a gated feed-forward part as a module of a layer's spec."""

from __future__ import annotations

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalign import ops


class SwiGLU(MegatronModule):
    """silu(gate) * up of [gate, up], in one pass on a CPU. Megatron's MLP calls it where use_te_activation_func is set.

    The name is of Transformer Engine's modules, which the field was made for; a spec may give any.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, gate_up: Tensor) -> Tensor:
        return ops.swiglu(gate_up)
