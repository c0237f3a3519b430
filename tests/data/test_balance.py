"""Rows dealt out by tokens and cost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalign.data.balance import Budget, Unit, balanced, imbalance, units_of

BUDGET = Budget(tokens=100, cost=lambda length: length + length * length / 50, shares_prefixes=True)


def units(lengths: list[int]) -> list[Unit]:
    return units_of([[length] for length in lengths], [[0]] * len(lengths), BUDGET)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=40), ranks=st.integers(1, 5))
def test_every_row_once_within_the_budget_and_equally_often(lengths: list[int], ranks: int) -> None:
    dealt = balanced(units(lengths), ranks, BUDGET)
    assert sorted(row for parts in dealt for part in parts for row in part) == list(range(len(lengths)))
    assert len({len(parts) for parts in dealt}) == 1
    assert sum(not part for parts in dealt for part in parts) < ranks  # each would be a pass over nothing
    for part in (part for parts in dealt for part in parts):
        assert sum(lengths[row] for row in part) <= BUDGET.tokens or len(part) == 1
        assert part == sorted(part)
    assert dealt == balanced(units(lengths), ranks, BUDGET)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=30), ranks=st.integers(1, 5))
def test_without_a_budget_that_binds_the_worst_rank_has_at_most_four_thirds(lengths: list[int], ranks: int) -> None:
    wide = replace(BUDGET, tokens=1000)
    made = units_of([[length] for length in lengths], [[0]] * len(lengths), wide)
    costs = [sum(made[row].cost for (part,) in [parts] for row in part) for parts in balanced(made, ranks, wide)]
    if len(made) <= 6 and ranks <= 3:  # few enough to try all
        assert max(costs) <= (4 / 3) * _best(made, ranks) + 1e-9
    assert max(costs) <= 2 * max(sum(costs) / ranks, max(unit.cost for unit in made))


def _best(made: list[Unit], ranks: int) -> float:
    loads = [[0.0] * ranks]
    for unit in made:
        loads = [[*load[:r], load[r] + unit.cost, *load[r + 1 :]] for load in loads for r in range(ranks)]
    return min(map(max, loads))


def test_skewed_lengths_cost_ranks_less_waiting_than_rows_in_order() -> None:
    draw = random.Random(1)
    lengths = [min(90, int(draw.paretovariate(1.0) * 8)) for _ in range(64)]
    wide = replace(BUDGET, tokens=200)
    made = units_of([[length] for length in lengths], [[0]] * len(lengths), wide)
    in_order = [[list(range(start, start + 4)) for start in range(rank * 4, 64, 16)] for rank in range(4)]
    assert imbalance(made, in_order) > 0.1
    assert imbalance(made, balanced(made, 4, wide)) < 0.01


def test_rows_that_begin_alike_stay_together_and_count_what_they_share_once() -> None:
    rows, shared = [[40], [45], [42], [30], [60, 62]], [[0], [30], [30], [0], [0, 50]]
    made = units_of(rows, shared, BUDGET)
    assert [unit.rows for unit in made] == [(0, 1, 2), (3,), (4,)]
    assert [unit.tokens for unit in made] == [40 + 15 + 12, 30, 60 + 12]
    assert made[2].cost == pytest.approx(BUDGET.cost(60) + BUDGET.cost(62) - BUDGET.cost(50))
    assert balanced(made, 1, BUDGET) == [[[0, 1, 2, 3], [4]]]


def test_a_run_that_is_larger_than_the_budget_is_cut() -> None:
    made = units_of([[60]] * 4, [[0], [20], [20], [20]], BUDGET)
    assert [(unit.rows, unit.tokens) for unit in made] == [((0, 1), 100), ((2, 3), 100)]


def test_waiting_is_a_share_of_all_ranks_time() -> None:
    made = [Unit((row,), 1, cost) for row, cost in enumerate([6.0, 3.0, 2.0])]
    assert imbalance(made, [[[0], [2]], [[1], []]]) == pytest.approx(1 - 11 / 16)
    assert imbalance(made, [[[0]], [[1, 2]]]) == pytest.approx(1 - 11 / 12)
    assert imbalance([], [[[]], [[]]]) == 0.0
