"""What the loop itself must agree on: waiting for each other and deciding alike. Tiny CPU messages only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalign.errors import UserError
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


def agree(act: Callable[[], T], axis: Axis) -> T:
    """Does what may fail on this rank alone, a write for example; the OSError of any rank is raised on all of them."""
    found, mine = None, None
    try:
        found = act()
    except OSError as error:
        mine = error
    for error in gather_objects(mine, axis):
        if error is not None:
            raise error
    return found


def from_first(find: Callable[[], T], axis: Axis) -> T:
    """What the first rank finds, on every rank; its UserError or OSError is raised on all of them."""
    told: list[Any] = [None, None]
    if axis.rank == 0:
        try:
            told[0] = find()
        except (OSError, UserError) as error:
            told[1] = error
    if axis.size > 1:
        dist.broadcast_object_list(told, src=axis.ranks[0], group=axis.group)
    found, error = told
    if error is not None:
        raise error
    return found
