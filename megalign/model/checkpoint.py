"""Training checkpoints in Megatron-Core's torch_dist format: weights and optimizer, upstream names."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megalign.model.optimizer import adam_states
from megalign.patches.megatron import megatron_calls

_EXTRA_STATE = "_extra_state"


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
    with megatron_calls():
        wanted = _sharded_state(chunks, optimizer, is_loading=True)
        _leave_out_absent_extras(wanted, path)
        state = dist_checkpointing.load(wanted, path)
        for number, chunk in enumerate(chunks):
            missing, unexpected = _model_of(chunk).load_state_dict(state[_key(number)], strict=False)
            lost = [name for name in missing if not name.endswith(_EXTRA_STATE)]
            assert not lost and not unexpected, f"missing {lost[:5]}, unexpected {unexpected[:5]}"
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])


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
