"""Where Megatron asks for Transformer Engine that is not there, or takes its absence for its presence."""

from __future__ import annotations

import functools
from typing import Any


def recompute_without_transformer_engine() -> None:
    """tensor_parallel/random.py:636 takes fp8=False, its default, for FP8 and asks Transformer Engine, here or not.

    It is what recomputes norms. Goes when upstream tests the value.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    initialize = CheckpointWithoutOutput.__init__

    @functools.wraps(initialize)
    def initialize_by_value(self: Any, fp8: Any = None, *args: Any, **kwargs: Any) -> None:
        initialize(self, fp8 or None, *args, **kwargs)

    CheckpointWithoutOutput.__init__ = initialize_by_value


def do_without_transformer_engine() -> None:
    """Where modules take its absence for its presence (0.16.1).

    (1) moe_utils.py:1192 asks whether te_general_gemm is None; :34 imports it with Transformer Engine only.
    (2) multi_latent_attention.py:56 takes the stand-in of extensions/transformer_engine.py:84 for the real one, and
    :185 asks for instances of it. Both go with upstream's repairs.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not transformer_engine.HAVE_TE:
        multi_latent_attention.HAVE_TE = False
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
