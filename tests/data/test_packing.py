"""Packs against trl.pack_dataset."""

from __future__ import annotations

import random
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import pack_dataset as trl_pack_dataset

from megalign.data.packing import pack_dataset, row_packs
from megalign.data.rows import ROW_NUMBER

STRATEGIES = ("bfd", "bfd_split", "wrapped")
FEATURES = Features({"input_ids": List(Value("int64")), "loss_mask": List(Value("bool"))})


def rows_of(lengths: list[int]) -> Dataset:
    """Tokens that tell where they come from, masks that differ from row to row."""
    columns: dict[str, list[Any]] = {"input_ids": [], "loss_mask": []}
    for row, length in enumerate(lengths):
        columns["input_ids"].append([1000 * row + place for place in range(length)])
        columns["loss_mask"].append([(row + place) % 3 == 0 for place in range(length)])
    return Dataset.from_dict(columns, features=FEATURES)


def assert_equal_to_trls(lengths: list[int], max_length: int, strategy: str) -> None:
    rows = rows_of(lengths)
    theirs = trl_pack_dataset(rows, max_length, strategy).to_dict()
    numbers = [7 + row for row in range(len(lengths))]
    ours = pack_dataset(rows.add_column(ROW_NUMBER, numbers), max_length, strategy).to_dict()
    told, seen = ours.pop(ROW_NUMBER), [[7 + token // 1000 for token in ids] for ids in ours["input_ids"]]
    assert [sorted(numbers) for numbers in told] == [sorted(set(numbers)) for numbers in seen]
    if strategy == "wrapped":
        theirs["seq_lengths"] = [[len(ids)] for ids in theirs["input_ids"]]
    assert ours == theirs


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("lengths", "max_length"),
    [
        ([5, 2, 3, 1], 4),  # TRL's own example
        ([4, 4, 4], 4),
        ([9, 1, 0, 7, 2, 2], 4),
        ([3, 3, 2, 2, 1, 1], 5),
        ([1], 8),
    ],
)
def test_packs_are_trls(lengths: list[int], max_length: int, strategy: str) -> None:
    assert_equal_to_trls(lengths, max_length, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packs_are_trls_over_more_rows_than_are_packed_at_a_time(strategy: str) -> None:
    draw = random.Random(0)
    assert_equal_to_trls([draw.randint(1, 40) for _ in range(2300)], 37, strategy)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=40),
    max_length=st.integers(1, 20),
    strategy=st.sampled_from(STRATEGIES),
)
def test_no_pack_is_too_long_and_no_token_lost_but_by_truncation(
    lengths: list[int], max_length: int, strategy: str
) -> None:
    packs = row_packs(lengths, max_length, strategy)
    pieces = [piece for pack in packs for sequence in pack for piece in sequence]
    sizes = [sum(piece.stop - piece.start for sequence in pack for piece in sequence) for pack in packs]
    assert all(0 < size <= max_length for size in sizes)
    tokens = [(piece.row, place) for piece in pieces for place in range(piece.start, piece.stop)]
    kept = [min(length, max_length) if strategy == "bfd" else length for length in lengths]
    assert sorted(tokens) == [(row, place) for row, length in enumerate(kept) for place in range(length)]
