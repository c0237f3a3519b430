"""Training checkpoints in Megatron-Core's torch_dist format: weights and optimizer, upstream names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megalign.checkpoints.reader import COMMON_FILE
from megalign.model.optimizer import adam_states
from megalign.patches.megatron import megatron_calls
from megalign.patches.unpickling import refusal_in
from megalign.unpickle import METADATA_FILE, load_data, refuse_classes_in_metadata


def save(path: str, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> None:
    """Writes the state of all ranks into `path`; collective. With an optimizer `chunks` are DDP-wrapped."""
    if optimizer is not None:
        adam_states(optimizer)  # before the first step there would be none to write
    if dist.get_rank() == 0:
        os.makedirs(path, exist_ok=True)
    dist.barrier()
    with megatron_calls():
        dist_checkpointing.save(_sharded_state(chunks, optimizer, is_loading=False), path)
    dist.barrier()


def load(path: str, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> None:
    """Reads what `save` wrote into the live model and optimizer; collective."""
    if optimizer is not None:
        adam_states(optimizer)  # the optimizer describes its shards by its state, so there must be one
    # Not left to the patched readers alone: torch asks further files when one cannot be read, and hides why.
    refuse_classes_in_metadata(Path(path) / METADATA_FILE)
    _refuse_classes_in_common_state(path)
    with megatron_calls():
        state = _load(_sharded_state(chunks, optimizer, is_loading=True), path)
        for number, chunk in enumerate(chunks):
            _model_of(chunk).load_state_dict(state[_key(number)])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])


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
