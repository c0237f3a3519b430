"""NVIDIA's optional libraries: which are here, and what Megatron takes from them. Both need a GPU."""

from __future__ import annotations

import importlib

from megatron.core import optimizer as megatron_optimizer
from megatron.core.extensions import transformer_engine

from megalign import device


def has_transformer_engine() -> bool:
    """Whether Megatron could import Transformer Engine, and there is a GPU to run it on."""
    return transformer_engine.HAVE_TE and device.on_cuda()


def has_apex() -> bool:
    """Whether NVIDIA's Apex is installed; PyPI's package of that name is another project."""
    return _imports("apex.optimizers", "FusedAdam")


def fuses_gradient_accumulation(uses_transformer_engine: bool) -> bool:
    """Whether weight gradients can be added to the fp32 buffers inside the matrix product.

    Transformer Engine's linears do it themselves, Megatron's with a kernel that Apex's build makes.
    """
    return device.on_cuda() and (uses_transformer_engine or _imports("fused_weight_gradient_mlp_cuda"))


def optimizer_name() -> str:
    """Which AdamW Megatron found, and why not a fused one."""
    package = megatron_optimizer.Adam.__module__.partition(".")[0]
    names = {"transformer_engine": "Transformer Engine's fused Adam", "apex": "Apex's fused Adam"}
    return names.get(package, "torch AdamW (NVIDIA Apex is not installed)")


def layers_name(uses_transformer_engine: bool) -> str:
    """Which modules the layers are made of, and why not faster ones."""
    if uses_transformer_engine:
        return "Transformer Engine"
    if has_transformer_engine():
        return "plain torch (transformer_impl='local')"
    reason = "there is no GPU" if transformer_engine.HAVE_TE else "Transformer Engine is not installed"
    return f"plain torch ({reason})"


def _imports(module: str, name: str | None = None) -> bool:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    return name is None or hasattr(found, name)
