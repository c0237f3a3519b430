"""Small all-reduces of a step: its counts, and the metrics of its microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megalign import device
from megalign.batch import Batch, Counts, Metric
from megalign.parallel.control import gather_objects
from megalign.parallel.groups import Axis, ParallelGroups

T = TypeVar("T")
CountFn = Callable[[Batch], Tensor]  # a microbatch's part of a global count, 0-dimensional

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def reduce_counts(batches: list[Batch], groups: ParallelGroups, named: Mapping[str, CountFn] | None = None) -> Counts:
    """Loss tokens, sequences and the `named` counts over all microbatches and data-parallel ranks."""
    named = named or {}
    local = [
        sum(float(batch["loss_mask"].sum()) for batch in batches),
        float(sum(batch.num_sequences for batch in batches)),
        *(sum(float(count(batch)) for batch in batches) for count in named.values()),
    ]
    tokens, sequences, *others = sum_over(torch.tensor(local, dtype=torch.float64), groups.dp).tolist()
    return Counts(tokens=tokens, sequences=sequences, named=dict(zip(named, others, strict=True)))


def sum_over(values: Tensor, axis: Axis) -> Tensor:
    """The sum of a small CPU tensor over the ranks of an axis."""
    if axis.size == 1:
        return values
    totals = values.to(device.device())
    dist.all_reduce(totals, group=axis.group)
    return totals.to(values.device)


def gather_over(values: Tensor, axis: Axis) -> tuple[Tensor, int]:
    """[n] of each rank, of any lengths, on the CPU -> [N] of all in rank order, and where this rank's part begins."""
    if axis.size == 1:
        return values, 0
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in axis.ranks]
    dist.all_gather(lengths, torch.tensor([len(values)]), group=axis.group)
    sizes = [int(length) for length in lengths]
    padded = values.new_zeros(max(sizes))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in axis.ranks]
    dist.all_gather(parts, padded, group=axis.group)
    gathered = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return gathered, sum(sizes[: axis.rank])


def gather_rows(mine: Mapping[int, T], axis: Axis) -> list[T]:
    """Values that the ranks hold of rows 0 .. N - 1, each row's on one rank at least -> all of them, in order."""
    found = {row: value for part in gather_objects(dict(mine), axis) for row, value in part.items()}
    return [found[row] for row in range(len(found))]


def union_over(numbers: Iterable[int], axis: Axis) -> list[int]:
    """What any rank of the axis names, each once, in order."""
    return sorted(set().union(*gather_objects(set(numbers), axis)))


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
