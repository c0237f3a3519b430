"""Several passes over a GPU's memory as one, by torch.compile; what the plain torch layers have in such passes.

Whole layers are not compiled: products and attention are libraries' kernels already, and packed microbatches have a new
number of tokens each, so that CUDA graphs, which replay one shape, have nothing to replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_wanted = True
# Of one function: the models of a process, each with gradients and without. Past 8 torch would give up, with a warning.
_MOST_VARIANTS = 64


def compile_passes(wanted: bool) -> None:
    """Whether `one_pass` compiles from now on, in this process."""
    global _wanted
    _wanted = wanted


def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of activations [tokens, ...], compiled where they are bf16 on a GPU, once for any number of tokens.

    fp32 there is for comparing: it stays as it is written.
    """
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(activations: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        # One token is a shape of its own to the compiler.
        if not (_wanted and activations.is_cuda and activations.dtype is torch.bfloat16 and len(activations) > 1):
            return function(activations, *args, **kwargs)
        if compiled is None:  # torch's compiler takes seconds to import
            compiled = torch.compile(function)
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
        for tensor in (activations, *args):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and len(tensor) == len(activations):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(activations, *args, **kwargs)

    return call
