"""Gradients and weights that travel between data-parallel ranks while the model computes: Megatron's DDP.

With overlap_param_gather an optimizer step leaves each rank with its shard of the new weights only. The others' come
bucket by bucket in the next forward pass, each before the first module that holds one of its parameters. Whatever
reads weights otherwise calls `finish_gather` first. Stages are not aligned with one another (Megatron's
align_grad_reduce and align_param_gather, with the schedules' grad_sync_func and param_sync_func): it changes when the
messages leave, and no number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megalign.patches.megatron import megatron_calls

if TYPE_CHECKING:
    from megalign.config import LoopConfig
    from megalign.parallel.groups import ParallelGroups


def reduce_in_last_microbatch(config: TransformerConfig, wrapped: list[DistributedDataParallel]) -> None:
    """The schedule keeps DDP from reducing gradients before the last microbatch has added its own."""
    waits = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = waits if len(waits) > 1 else waits[0]


def overlapping(args: LoopConfig, groups: ParallelGroups) -> dict[str, bool]:
    """DDP's two fields; without a second rank that has gradients of the same weights there is nothing to wait for."""
    several = groups.dp.size * groups.cp.size > 1
    return {
        "overlap_grad_reduce": several and args.overlaps_grad_reduce,
        "overlap_param_gather": several and args.overlaps_param_gather,
    }


def finish_gather(chunks: Iterable[nn.Module]) -> None:
    """Every parameter is what the last optimizer step made; nothing where it is already. Collective over dp."""
    with megatron_calls():
        for chunk in chunks:
            is_trained = isinstance(chunk, DistributedDataParallel)
            if not (is_trained and chunk.ddp_config.overlap_param_gather):
                continue
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                # A gather on its way is waited for; one that has arrived is not repeated.
                if group.param_gather_handle is not None or not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)
