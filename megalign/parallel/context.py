"""Context parallelism: which tokens of a packed batch are this rank's, and columns and keys over its ranks.

Each sequence is cut into 2 * cp equal pieces, of which rank r holds r and 2 * cp - 1 - r (zigzag), so that causal
attention costs every rank the same. A rank's tokens stand in the order of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.groups import Axis


def positions_of(lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """[T / size] int64: where the tokens of context rank `rank` of `size` stand in the batch; lengths sum to T."""
    if size == 1:
        return torch.arange(sum(lengths))
    parts, start = [], 0
    for length in lengths:
        piece, rest = divmod(length, 2 * size)
        assert rest == 0, f"a sequence of {length} tokens cannot be cut into {2 * size} pieces"
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * piece, start + (number + 1) * piece))
        start += length
    return torch.cat(parts)


def whole_order(lengths: Sequence[int], size: int) -> Tensor:
    """[T] int64: where the tokens of all ranks, one rank behind the other, stand in the batch."""
    return torch.cat([positions_of(lengths, rank, size) for rank in range(size)])


def gather_tokens(local: Tensor, order: Tensor, cp: Axis) -> Tensor:
    """[T / cp, ...] of each rank -> [T, ...] in the batch's order, on every rank; `order` as `whole_order` gives it.

    Backward sums the ranks' gradients, and each takes its own tokens': every rank has used all of them.
    """
    return local if cp.size == 1 else _GatherTokens.apply(local, order, cp)


def sum_shares(columns: Tensor, cp: Axis) -> Tensor:
    """The sum over the ranks of columns that are 0 off their own tokens.

    Backward keeps the gradient as it is: every rank goes on with the same numbers to the same loss.
    """
    return columns if cp.size == 1 else _SumShares.apply(columns, cp)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, order, cp):  # noqa: ANN001, ANN205
        ctx.order, ctx.cp = order, cp
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(cp.size)]
        dist.all_gather(parts, local.contiguous(), group=cp.group)
        gathered = torch.cat(parts)
        return torch.empty_like(gathered).index_copy_(0, order, gathered)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.cp.group)
        mine = ctx.order.view(ctx.cp.size, -1)[ctx.cp.rank]
        return grad.index_select(0, mine), None, None


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, cp):  # noqa: ANN001, ANN205
        total = columns.clone()
        dist.all_reduce(total, group=cp.group)
        return total

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return grad, None
