"""NVIDIA's optional libraries, which need a GPU: which are here, and what Megatron takes from them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import optimizer as megatron_optimizer
from megatron.core.extensions import transformer_engine

from megalign import device

TRANSFORMER_ENGINE, LOCAL = "transformer_engine", "local"  # Megatron's words for what layers are made of


def has_transformer_engine() -> bool:
    """Whether Megatron could import Transformer Engine, and there is a GPU to run it on."""
    return transformer_engine.HAVE_TE and device.on_cuda()


def optimizer_name() -> str:
    """Which AdamW steps: NVIDIA's where Megatron found one."""
    package = megatron_optimizer.Adam.__module__.partition(".")[0]
    names = {"transformer_engine": "Transformer Engine's fused Adam", "apex": "Apex's fused Adam"}
    return names.get(package, "torch's fused AdamW (NVIDIA Apex is not installed)")


def layers_name(implementation: str, asked_for: str, lacks: Sequence[str] = ()) -> str:
    """Which modules the layers are made of, and why not faster ones.

    `asked_for` is the field transformer_impl; Transformer Engine `lacks` what the model needs.
    """
    if implementation == TRANSFORMER_ENGINE:
        return "Transformer Engine"
    if asked_for == LOCAL:
        return "plain torch (transformer_impl='local')"
    if has_transformer_engine():
        return f"plain torch (the model needs a {' and a '.join(lacks)}, which Transformer Engine has not)"
    reason = "there is no GPU" if transformer_engine.HAVE_TE else "Transformer Engine is not installed"
    return f"plain torch ({reason})"
