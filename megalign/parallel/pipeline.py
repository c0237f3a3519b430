"""Microbatches through Megatron's pipeline schedules; the sole importer of them.

The caller's loss is this microbatch's share of a globally normalised loss. Megatron wants (sum, num_tokens)
and divides by the global number itself; that translation happens here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megalign import device
from megalign.batch import Batch, Metric
from megalign.parallel.groups import ParallelGroups
from megalign.parallel.p2p import known_shapes
from megalign.patches.megatron import megatron_calls
from megalign.waiting import Waiting

Forward = Callable[[nn.Module, Batch], Tensor]  # one stage: its input arrives by set_input_tensor
Rows = Callable[[Batch], int]  # of a stage's hidden states [rows, 1, H], in and out
Head = Callable[[Tensor, Batch], dict[str, Tensor]]  # hidden [T, 1, H] of the last stage -> token columns
Loss = Callable[[dict[str, Tensor], Batch], tuple[Tensor, dict[str, Metric]]]


def train(
    chunks: list[nn.Module],
    batches: list[Batch],
    forward: Forward,
    rows: Rows,
    head: Head,
    loss: Loss,
    groups: ParallelGroups,
    waiting: Waiting | None = None,
) -> list[dict[str, Metric]]:
    """Forward and backward of all microbatches; gradients of the global loss are left in the DDP buffers.

    Returns the metrics of each microbatch on the last stage, an empty list elsewhere; `waiting` is told of messages.
    """
    batches = _whole_rounds(chunks, batches, groups)
    # N counts all tokens but pads, loss tokens or not: it cancels in our loss, and the router's auxiliary loss is a
    # mean over them.
    shares = {id(batch): sum(batch.host_lengths.unpadded[: batch.num_sequences]) for batch in batches}
    fed = torch.tensor([sum(shares[id(batch)] for batch in batches)], device=device.device())
    if groups.dp.size > 1:
        dist.all_reduce(fed, group=groups.dp.group)
    num_tokens = int(fed)

    def forward_step(stream: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(stream)

        def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
            value, metrics = loss(head(hidden, batch), batch)
            assert value.requires_grad, "a loss without a graph would hang the pipeline: add logprobs.sum() * 0"
            share = shares[id(batch)] if groups.cp.rank == 0 else 0
            detached = {name: Metric(metric.value.detach(), metric.reduce) for name, metric in metrics.items()}
            return (
                value * num_tokens,
                torch.tensor(share, dtype=torch.int, device=hidden.device),
                {"loss": Metric(value.detach()), **detached},
            )

        return _checked(forward(model, batch), rows(batch)), loss_func

    return _run(forward_step, chunks, batches, rows, forward_only=False, waiting=waiting)


def evaluate(
    chunks: list[nn.Module], batches: list[Batch], forward: Forward, rows: Rows, head: Head, groups: ParallelGroups
) -> list[dict[str, Tensor]]:
    """The head's columns for each microbatch, without gradient, on every stage of the pipeline."""

    def forward_step(stream: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(stream)

        def columns(hidden: Tensor, non_loss_data: bool = True) -> dict[str, Tensor]:
            return head(hidden, batch)

        return _checked(forward(model, batch), rows(batch)), columns

    with torch.no_grad():
        padded = _whole_rounds(chunks, batches, groups)
        results = _run(forward_step, chunks, padded, rows, forward_only=True)[: len(batches)]
        return _broadcast_columns(results, batches, groups)


def _whole_rounds(chunks: list[nn.Module], batches: list[Batch], groups: ParallelGroups) -> list[Batch]:
    """With dummies where others wait for this rank's microbatches.

    The interleaved schedule takes them in rounds of one for each stage; replicas that share experts send each other
    the tokens of each.
    """
    whole = len(batches)
    if groups.experts_span_replicas:
        most = torch.tensor(whole, device=device.device())
        dist.all_reduce(most, dist.ReduceOp.MAX, group=groups.dp.group)
        whole = int(most)
    whole += -whole % groups.pp.size if len(chunks) > 1 else 0
    if whole == len(batches):
        return batches
    return batches + [Batch.dummy(groups.token_multiple).to(device.device())] * (whole - len(batches))


def _checked(hidden: Tensor, rows: int) -> Tensor:
    assert len(hidden) == rows, f"a stage computed {len(hidden)} rows of a microbatch that has {rows}: another's input"
    return hidden


def _run(
    forward_step: Any,
    chunks: list[nn.Module],
    batches: list[Batch],
    rows: Rows,
    *,
    forward_only: bool,
    waiting: Waiting | None = None,
) -> list[Any]:
    assert batches, "a rank without rows feeds Batch.dummy"
    interleaved = len(chunks) > 1
    lengths = [rows(batch) for batch in batches]
    shapes = known_shapes(lengths, len(chunks), forward_only=forward_only, waiting=waiting)
    with megatron_calls(), shapes:
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(batches),
            seq_length=1,  # unused: microbatches differ (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _broadcast_columns(
    results: list[dict[str, Tensor]], batches: list[Batch], groups: ParallelGroups
) -> list[dict[str, Tensor]]:
    """One flat broadcast from the last stage: every rank knows each T, so shapes need not travel."""
    if groups.pp.size == 1:
        return results
    names = [sorted(results[0]) if groups.is_last_stage else None]
    source = groups.pp.ranks[-1]
    dist.broadcast_object_list(names, src=source, group=groups.pp.group)
    lengths = [batch.num_tokens for batch in batches]
    flat = torch.empty(len(names[0]), sum(lengths), dtype=torch.float32, device=device.device())
    if groups.is_last_stage:
        for row, name in enumerate(names[0]):
            torch.cat([result[name] for result in results], out=flat[row])
    dist.broadcast(flat, src=source, group=groups.pp.group)
    parts = flat.split(lengths, dim=1)
    return [dict(zip(names[0], part.unbind(0), strict=True)) for part in parts]
