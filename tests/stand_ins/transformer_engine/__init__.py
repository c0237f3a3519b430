"""What Megatron-Core 0.16.1 calls of Transformer Engine, in plain torch: it shows our seams to it, and nothing of it.

Whatever else is imported from here is an empty class.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import torch

__version__ = "1.12.0"
_WRITTEN = {"transformer_engine.pytorch", "transformer_engine.pytorch.fp8"}


class _Anything(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (torch.autograd.Function,), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        # Its optimizers must look absent, so that Megatron takes torch's.
        if name.startswith("transformer_engine.") and name not in _WRITTEN and "optimizers" not in name:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Anything(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())

# Megatron takes them from the package.
import transformer_engine.common.recipe  # noqa: E402,F401
import transformer_engine.pytorch.attention as attention  # noqa: E402
import transformer_engine.pytorch.cpu_offload as cpu_offload  # noqa: E402

cpu_offload.get_cpu_offload_context = lambda *args, **kwargs: (contextlib.nullcontext(), lambda tensor: tensor)


class _SplitAlongDim:
    @staticmethod
    def apply(tensor: torch.Tensor, dim: int, sizes: list[int], *_: Any) -> tuple[torch.Tensor, ...]:
        return torch.split(tensor, sizes, dim=dim)


attention._SplitAlongDim = _SplitAlongDim
