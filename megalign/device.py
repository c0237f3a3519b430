"""CUDA or CPU: which device, which communication backend, how much memory."""

from __future__ import annotations

import ctypes
import gc
import os

import torch

from megalign import ops
from megalign.errors import UserError


def on_cuda() -> bool:
    """Whether this process trains on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank: the GPU that `select_device` made current, or the CPU."""
    if not on_cuda():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """torch.distributed's backend string; on GPUs, small CPU columns still travel over gloo."""
    return "cpu:gloo,cuda:nccl" if on_cuda() else "gloo"


def select_device() -> None:
    """Makes the GPU of LOCAL_RANK current, or the only one that is visible; prepares a CPU for bf16."""
    if not on_cuda():
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            ops.multiply_bf16_in_fp32()
        return
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if 1 < count <= local_rank:
        raise UserError(
            f"LOCAL_RANK={local_rank} must be below {count}, the number of visible GPUs; start at most {count} ranks "
            "a node, or give each rank one GPU of its own with CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank if count > 1 else 0)


def multiplies_bf16() -> bool:
    """Whether the device multiplies matrices in bf16 itself; a processor without it takes several times fp32's time."""
    able = torch.cpu.get_capabilities()
    return on_cuda() or any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


# TFLOP/s of a dense bf16 product, from NVIDIA's data sheets (half of those with sparsity); SXM parts.
_PEAKS = {"A100": 312, "H100": 989, "H200": 989, "GB200": 2500, "B200": 2250}
_OTHER_SHEETS = {"PCIE", "NVL", "MIG", "GRID"}  # cards, and slices of a part


def peak_flops() -> float | None:
    """What a data sheet promises of bf16 products a second; None for a CPU and for GPUs that are not in the list."""
    if not on_cuda():
        return None
    return promised_flops(torch.cuda.get_device_name())


def promised_flops(name: str) -> float | None:
    """The same of a GPU of that name."""
    if _OTHER_SHEETS & {*name.upper().replace("-", " ").split()}:
        return None
    return next((1e12 * tflops for part, tflops in _PEAKS.items() if part in name), None)


def begin_peak() -> None:
    """From now on `peak_bytes` is new."""
    if on_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The most that torch held on the GPU since `begin_peak`; on a CPU what is held now: whoever wants a peak asks
    often."""
    return torch.cuda.max_memory_allocated() if on_cuda() else resident_bytes()


def synchronize() -> None:
    """Waits for the device, so that a wall-clock time means what it says."""
    if on_cuda():
        torch.cuda.synchronize()


def release_memory() -> None:
    """Gives freed memory back: to the driver on CUDA, to the operating system on CPU."""
    gc.collect()
    if on_cuda():
        torch.cuda.empty_cache()
    else:
        # glibc keeps freed blocks in its arenas; a sleeping engine must not look resident.
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Bytes held: allocated by torch on CUDA, anonymous resident memory of the process on CPU."""
    if on_cuda():
        return torch.cuda.memory_allocated()
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon line")
