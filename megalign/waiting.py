"""How long this rank's device waits for others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megalign.device import on_cuda


class Waiting:
    """Seconds in which the device had nothing to do but wait: by events of its stream on a GPU, by the clock else."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block waits."""
        begin = _moment()
        yield
        self._spans.append((begin, _moment()))

    def until(self, handle: Any) -> AwaitedHandle:
        """A message's handle, whose wait() is such a block."""
        return AwaitedHandle(handle, self)

    def seconds(self) -> float:
        """Of all blocks so far; waits for the device."""
        if not on_cuda():
            return sum(end - begin for begin, end in self._spans)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3


class AwaitedHandle:
    """torch.distributed's handle, as far as Megatron's schedules use it."""

    def __init__(self, handle: Any, waiting: Waiting) -> None:
        self._handle, self._waiting = handle, waiting

    def wait(self) -> Any:
        """Until the message has arrived."""
        with self._waiting():
            return self._handle.wait()


def _moment() -> Any:
    if not on_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
