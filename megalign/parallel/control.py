"""What the loop itself must agree on: waiting for each other and deciding alike. Tiny CPU messages only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megalign.parallel.groups import Axis


def barrier(axis: Axis) -> None:
    """Returns when every rank of the axis has come here."""
    any_rank([False], axis)


def any_rank(flags: Sequence[bool], axis: Axis) -> list[bool]:
    """For each flag, whether it is set on any rank: one rank's wish to stop is everybody's."""
    if axis.size == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=axis.group)
    return [bool(vote) for vote in votes.tolist()]
