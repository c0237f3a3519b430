"""A step's rows as microbatches of at most so many tokens, which cost every data-parallel rank the same."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Dealt = list[list[list[int]]]  # by rank, by microbatch: row numbers


@dataclass(frozen=True)
class Budget:
    """How large a microbatch may be, and what a sequence costs."""

    tokens: int
    cost: Callable[[int], float]  # of a sequence by its length: attention's grows with the square
    shares_prefixes: bool  # whether what neighbouring sequences begin with is computed once


@dataclass(frozen=True)
class Unit:
    """Neighbouring rows that stay together."""

    rows: tuple[int, ...]
    tokens: int
    cost: float


def units_of(rows: Sequence[Sequence[int]], shared: Sequence[Sequence[int]], budget: Budget) -> list[Unit]:
    """From the lengths of each row's sequences, and how many tokens each has in common with the one before it.

    Rows that begin as the row before them does go together as far as the budget allows: what they share is computed
    once, and not counted twice.
    """
    units: list[Unit] = []
    for number, (lengths, common) in enumerate(zip(rows, shared, strict=True)):
        inside = (0, *common[1:])  # what holds wherever the row goes
        alone = Unit((number,), *_size(lengths, inside, budget))
        joined = _size(lengths, common, budget)
        if common[0] and units and units[-1].tokens + joined[0] <= budget.tokens:
            last = units.pop()
            alone = Unit((*last.rows, number), last.tokens + joined[0], last.cost + joined[1])
        units.append(alone)
    return units


def balanced(units: Sequence[Unit], num_ranks: int, budget: Budget) -> Dealt:
    """As few microbatches as the budget allows, the same number on every rank; some may be empty.

    The costliest unit first, each to the cheapest microbatch with room for it (Graham 1969: at most 4/3 of the least
    possible maximum, where the budget binds nowhere). A unit above the budget has a microbatch of its own. Equal on
    every rank, since nothing is drawn.
    """
    order = sorted(range(len(units)), key=lambda place: (-units[place].cost, place))
    least = sum(min(unit.tokens, budget.tokens) for unit in units)
    count = max(1, -(-least // (budget.tokens * num_ranks)))
    while (bins := _filled(units, order, count * num_ranks, budget.tokens)) is None:
        count += 1
    # Microbatches of like cost stand side by side on the ranks, which wait for each other at every one where they share
    # experts; the costliest of each round goes to the rank that has least to do so far.
    costs = [sum(units[place].cost for place in places) for places in bins]
    by_cost = sorted(range(len(bins)), key=lambda number: (-costs[number], bins[number]))
    dealt: Dealt = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        idlest = sorted(range(num_ranks), key=lambda rank: (load[rank], rank))
        for rank, number in zip(idlest, by_cost[start : start + num_ranks], strict=True):
            load[rank] += costs[number]
            dealt[rank].append(sorted(row for place in bins[number] for row in units[place].rows))
    return dealt


def imbalance(units: Sequence[Unit], dealt: Dealt) -> float:
    """The share of the ranks' time that is spent waiting, at the step's end, for the rank with the most to do."""
    cost = {unit.rows[0]: unit.cost for unit in units}
    costs = [sum(cost.get(row, 0.0) for part in parts for row in part) for parts in dealt]
    return 1.0 - sum(costs) / (len(costs) * max(costs)) if any(costs) else 0.0


def _size(lengths: Sequence[int], common: Sequence[int], budget: Budget) -> tuple[int, float]:
    tokens = sum(lengths) - sum(common)
    return tokens, sum(budget.cost(length) - budget.cost(same) for length, same in zip(lengths, common, strict=True))


def _filled(units: Sequence[Unit], order: Sequence[int], count: int, room: int) -> list[list[int]] | None:
    """Units by bin; None when they do not fit into so few."""
    bins: list[list[int]] = [[] for _ in range(count)]
    left = [room] * count
    cheapest = [(0.0, number) for number in range(count)]  # a heap
    for place in order:
        full = []
        while cheapest:
            cost, number = heapq.heappop(cheapest)
            if units[place].tokens <= left[number] or not bins[number]:
                break
            full.append((cost, number))
        else:
            return None
        bins[number].append(place)
        left[number] -= units[place].tokens
        for entry in (*full, (cost + units[place].cost, number)):
            heapq.heappush(cheapest, entry)
    return bins
