"""A CPU in place of a GPU: torch.cuda's functions, the device="cuda" of calls, no compiler."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megalign.patches.megatron.replace import replace


def import_without_compiler() -> None:
    """jit.py:21 hands Megatron's fusions to torch.compile as they are imported: a second of a start. On a CPU they run
    as they are written."""

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return as_it_is if function is None else function

    compile_function, torch.compile = torch.compile, as_it_is
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_function


class CudaLiteralsMeanCpu(TorchFunctionMode):
    """schedules.py:596,983,2138/749,1121,2292 and clip_grads.py:90,174/96,180 name device="cuda".

    Goes when upstream takes a device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # rope_utils.py:62 pins, for the copy to a GPU
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # distrib_optimizer.py:361/401 and optimizer.py:671/1008 compare this string to tell dtypes apart.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _NoStream:
    """Stands in for torch.cuda.Stream, Event and the contexts around them: a CPU has one queue."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> bool:
        return False

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *args: Any) -> _NoStream:
        return _NoStream()

    def query(self) -> bool:
        return True


def replace_cuda_functions() -> None:
    """p2p_communication.py:190/211 and many more call these unconditionally; goes with a CPU backend upstream."""
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = cuda.stream = cuda.device = _NoStream
    cuda.current_stream = cuda.default_stream = _NoStream
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def replace_rng_tracker_state() -> None:
    """tensor_parallel/random.py:41,72/104,135 reach into torch.cuda's generators; goes with a CPU backend upstream."""
    import megatron.core.tensor_parallel.random as tracker

    replace(tracker, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    replace(tracker, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
