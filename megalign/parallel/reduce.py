"""Small all-reduces of a step: its counts, and the metrics of its microbatches."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalign import device
from megalign.batch import Batch, Counts, Metric
from megalign.parallel.groups import ParallelGroups

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def reduce_counts(batches: list[Batch], groups: ParallelGroups) -> Counts:
    """Loss tokens and sequences over all microbatches and data-parallel ranks."""
    local = [sum(int(batch["loss_mask"].sum()) for batch in batches), sum(batch.num_sequences for batch in batches)]
    totals = torch.tensor(local, dtype=torch.float64, device=device.device())
    if groups.dp.size > 1:
        dist.all_reduce(totals, group=groups.dp.group)
    return Counts(tokens=float(totals[0]), sequences=float(totals[1]))


def reduce_metrics(metrics: list[dict[str, Metric]], groups: ParallelGroups) -> dict[str, float]:
    """Metrics of the last stage's microbatches -> one number each, on every rank of the job."""
    reduced: dict[str, float] = {}
    if groups.is_last_stage:
        for how, operation in _OPERATIONS.items():
            names = [name for name, metric in metrics[0].items() if metric.reduce == how]
            if not names:
                continue
            stacked = torch.stack(
                [torch.stack([microbatch[name].value.double() for name in names]) for microbatch in metrics]
            )
            local = stacked.sum(0) if how == "sum" else stacked.amin(0) if how == "min" else stacked.amax(0)
            if groups.dp.size > 1:
                dist.all_reduce(local, operation, group=groups.dp.group)
            reduced.update(zip(names, local.tolist(), strict=True))
        reduced = {name: reduced[name] for name in metrics[0]}
    if groups.pp.size > 1:
        box = [reduced]
        dist.broadcast_object_list(box, src=groups.pp.ranks[-1], group=groups.pp.group)
        reduced = box[0]
    return reduced
