"""Real ranks for tests: gloo processes, started once per world size and reused, forked from a warm server.

`run_ranks(world, fn, *args)` runs a module-level function on every rank and returns the results in rank
order. The default process group has exactly `world` members; Megatron's groups are left to the function.
On a machine with a GPU one rank is the calling process itself, on that GPU and over NCCL; several see no GPU.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from megalign.launch import hold_port

_CONTEXT = mp.get_context("forkserver")
# What every worker would import anyway: paid once, in the server they are forked from.
_CONTEXT.set_forkserver_preload(["torch", "transformers", "tests.warm"])

_LONGEST_IDLE_S = 30.0
_MOST_THREADS = 500  # a layout's groups have some 40, which Megatron keeps alive; new processes cost half a second


class RanksError(AssertionError):
    """A rank raised; the text carries every rank's traceback."""


class _Pool:
    def __init__(self, world: int) -> None:
        self._port = hold_port()
        self.last_used = time.monotonic()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, rank, world, self._port.getsockname()[1]))
            with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # read by the server, which the first one starts
                process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((fn, args))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        end = time.monotonic() + timeout
        while len(results) + len(errors) < len(self.pipes) and time.monotonic() < end:
            for rank, pipe in enumerate(self.pipes):
                if rank in results or rank in errors:
                    continue
                try:
                    if pipe.poll(0.01):
                        ok, value = pipe.recv()
                        (results if ok else errors)[rank] = value
                except (EOFError, ConnectionResetError):
                    errors[rank] = f"process died with exit code {self.processes[rank].exitcode}"
            if errors:  # peers may wait in a collective for the rank that raised: give them a moment, no more
                end = min(end, time.monotonic() + 2)
        if errors or len(results) < len(self.pipes):
            self.close()
            silent = [rank for rank in range(len(self.pipes)) if rank not in results and rank not in errors]
            text = "\n".join(f"--- rank {rank} ---\n{error}" for rank, error in sorted(errors.items()))
            raise RanksError(f"{fn.__name__}: no answer from ranks {silent} within {timeout} s\n{text}")
        return [results[rank] for rank in range(len(self.pipes))]

    @property
    def is_worn(self) -> bool:
        """Whether threads of groups pile up there.

        Megatron's DDP keeps itself alive through autograd's hooks at times, and with it the gloo groups of its layout,
        each with a thread that polls.
        """
        return len(os.listdir(f"/proc/{self.processes[0].pid}/task")) > _MOST_THREADS

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # a rank that waits for work leaves by itself, finalizers run
        end = time.monotonic() + 2
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        self._port.close()


_POOLS: dict[int, _Pool] = {}


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, fresh: bool = False, on_cpu: bool = False
) -> list[Any]:
    """The results of `fn(*args)` on `world` ranks; `fresh` uses processes that nothing else has touched.

    With `on_cpu` one rank, too, is a process without a GPU.
    """
    if world == 1 and not on_cpu and _has_gpu():
        return [_on_host(fn(*args))]
    if fresh:
        pool = _Pool(world)
        try:
            return pool.run(fn, args, timeout)
        finally:
            pool.close()
    if world not in _POOLS:
        _POOLS[world] = _Pool(world)
    pool = _POOLS[world]
    close_idle_ranks(besides=pool)
    try:
        results = pool.run(fn, args, timeout)
    except RanksError:
        del _POOLS[world]
        raise
    pool.last_used = time.monotonic()
    if pool.is_worn:
        _POOLS.pop(world).close()
    return results


def close_idle_ranks(*, besides: _Pool | None = None) -> None:
    """Each gloo group looks a hundred times a second whether there is something to do: idle ranks took a third of two
    cores."""
    now = time.monotonic()
    for world, pool in list(_POOLS.items()):
        if pool is not besides and now - pool.last_used > _LONGEST_IDLE_S:
            _POOLS.pop(world).close()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _on_host(result: Any) -> Any:
    """The result with its tensors in host memory, as a pipe would deliver them."""
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), result)


@atexit.register
def _close_pools() -> None:
    for pool in _POOLS.values():
        pool.close()


def _serve(pipe: Connection, rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    from megalign import liveness
    from megalign.patches.gloo import share_device

    torch.set_num_threads(1)
    share_device()
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=100))
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            liveness.leave()
            return
        try:
            pipe.send((True, fn(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
