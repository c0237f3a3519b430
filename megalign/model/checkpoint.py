"""Training checkpoints in Megatron-Core's torch_dist format: weights and optimizer, upstream names."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megalign.checkpoints.checksums import checksum
from megalign.checkpoints.reader import COMMON_FILE
from megalign.forked import Result, die_with
from megalign.model.optimizer import adam_states
from megalign.patches.megatron import megatron_calls
from megalign.patches.unpickling import refusal_in
from megalign.unpickle import METADATA_FILE, load_data, refuse_classes_in_metadata

_NICENESS = 10  # of a process that writes while training goes on
_EXTRA_STATE = "_extra_state"


class Saving:
    """A checkpoint on its way to the disk: a process of each rank's own writes what was there at the call."""

    def __init__(self, request: AsyncRequest, checksums: Result) -> None:
        self._queue, self._checksums = AsyncCallsQueue(), checksums
        with megatron_calls():
            self._queue.schedule_async_request(request)

    def finish(self, *, wait: bool) -> dict[str, str] | None:
        """Checksums of the files that this rank wrote, by name; None while some rank still writes. Collective.

        May be asked again: of several engines one is done before the other.
        """
        with megatron_calls():
            self._queue.maybe_finalize_async_calls(blocking=wait)
        return None if self._queue.get_num_unfinalized_calls() else self._checksums.get_nowait()


def begin_save(path: str, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> Saving:
    """Begins to write the state of all ranks into `path`; model and optimizer may change at once. Collective."""
    return Saving(*_request(path, chunks, optimizer))


def save(path: str, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> dict[str, str]:
    """Writes the state of all ranks into `path`; returns the checksums of this rank's files. Collective."""
    request, checksums = _request(path, chunks, optimizer)
    with megatron_calls():
        request.execute_sync()
    return checksums.get_nowait()


def load(path: str, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> None:
    """Reads what `save` wrote, at this layout or another, into the live model and optimizer; collective."""
    if optimizer is not None:
        adam_states(optimizer)  # the optimizer describes its shards by its state, so there must be one
    # Not left to the patched readers alone: torch asks further files when one cannot be read, and hides why.
    refuse_classes_in_metadata(Path(path) / METADATA_FILE)
    _refuse_classes_in_common_state(path)
    with megatron_calls():
        wanted = _sharded_state(chunks, optimizer, is_loading=True)
        _leave_out_absent_extras(wanted, path)
        state = _load(wanted, path)
        for number, chunk in enumerate(chunks):
            missing, unexpected = _model_of(chunk).load_state_dict(state[_key(number)], strict=False)
            lost = [name for name in missing if not name.endswith(_EXTRA_STATE)]
            assert not lost and not unexpected, f"missing {lost[:5]}, unexpected {unexpected[:5]}"
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])


def _request(path: str, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> tuple[AsyncRequest, Result]:
    """What is still to be done for a save, and what will be known after it. With an optimizer `chunks` are DDP's."""
    if optimizer is not None:
        adam_states(optimizer)  # before the first step there would be none to write
    if dist.get_rank() == 0:
        os.makedirs(path, exist_ok=True)
    dist.barrier()
    # 0.19 has a second way to save asynchronously, and a package for it.
    known = inspect.signature(dist_checkpointing.save).parameters
    way = {"async_strategy": "mcore"} if "async_strategy" in known else {}
    with megatron_calls():
        state = _sharded_state(chunks, optimizer, is_loading=False)
        request = dist_checkpointing.save(state, path, async_sharded_save=True, **way)
    checksums = Result()
    if request.async_fn is None:  # this rank has nothing to write
        checksums.put({})
        return request, checksums
    write = partial(_write, request.async_fn, Path(path), dist.get_rank(), os.getpid(), checksums)
    return request._replace(async_fn=write), checksums


def _write(
    megatron_writes: Callable[..., None],
    directory: Path,
    rank: int,
    trainer: int,
    checksums: Result,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Writes the rank's files and sums them up, in the trainer's process or in one that was forked for it."""
    if os.getpid() != trainer:
        die_with(trainer)
        os.nice(_NICENESS)
    megatron_writes(*args, **kwargs)
    checksums.put({file.name: checksum(file) for file in sorted(directory.glob(f"__{rank}_*"))})


def _leave_out_absent_extras(wanted: dict[str, Any], path: str) -> None:
    """Transformer Engine's modules have a state beside their weights (FP8's scales), which plain ones never wrote."""
    extras = [
        (part, name, value.unique_key)
        for part in wanted.values()
        for name, value in part.items()
        if isinstance(value, ShardedObject) and name.endswith(_EXTRA_STATE)
    ]
    if not extras:
        return
    written = load_sharded_metadata(path)
    for part, name, key in extras:
        if key not in written:
            del part[name]


def _load(state: dict[str, Any], path: str) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, path)
    except CheckpointException as error:
        refusal = refusal_in(error)
        if refusal is None:
            raise
        raise refusal from error


def _refuse_classes_in_common_state(path: str) -> None:
    """Megatron leaves it to torch.load's default (strategies/common.py:89/48), which a variable of the environment
    turns off."""
    file = Path(path) / COMMON_FILE
    if file.exists():  # 0.19 keeps it elsewhere
        with file.open("rb") as stream:
            load_data(stream, str(file))


def _sharded_state(chunks: list[nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """The tensors' names in the file are of the whole model: what a stage calls its chunks does not matter."""
    if optimizer is None:
        return {_key(number): chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": chunks[0].dp_cp_group}
    models = {_key(number): chunk.module.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}
    return {**models, "optimizer": optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)}


def _key(number: int) -> str:
    return f"model{number}"


def _model_of(chunk: nn.Module) -> nn.Module:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
