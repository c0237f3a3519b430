"""What the loop itself must agree on: waiting for each other and deciding alike. Tiny CPU messages only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from megalign.parallel.groups import Axis

T = TypeVar("T")


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


def gather_objects(mine: T, axis: Axis) -> list[T]:
    """Every rank's object, in rank order."""
    if axis.size == 1:
        return [mine]
    everyone: list[T] = [mine] * axis.size
    dist.all_gather_object(everyone, mine, group=axis.group)
    return everyone


def agree(act: Callable[[], None], axis: Axis) -> None:
    """Does what may fail on this rank alone, a write for example; the OSError of any rank is raised on all of them."""
    mine = None
    try:
        act()
    except OSError as error:
        mine = error
    for error in gather_objects(mine, axis):
        if error is not None:
            raise error
