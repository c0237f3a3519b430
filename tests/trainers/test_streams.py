"""What a trainer's constructor takes as rows: tables, lists, and streams of which max_steps says how much is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from megalign.errors import UserError
from megalign.trainers.rows import as_dataset


def stream(count: int) -> IterableDataset:
    def rows() -> Iterator[dict[str, int]]:
        yield from ({"n": place} for place in range(count))

    return IterableDataset.from_generator(rows)


def test_a_training_stream_is_read_as_far_as_it_is_needed() -> None:
    assert as_dataset(stream(10**9), "train_dataset", count=3)["n"] == [0, 1, 2]
    shuffled = as_dataset(stream(5000), "train_dataset", count=30, shuffle=True, seed=1)
    assert len(shuffled) == 30 and sorted(shuffled["n"]) != list(range(30))
    with pytest.raises(UserError, match="train_dataset is an IterableDataset and max_steps.*is not set"):
        as_dataset(stream(5), "train_dataset")


def test_an_evaluation_stream_is_read_whole_and_in_order() -> None:
    assert as_dataset(stream(2500), "eval_dataset")["n"] == list(range(2500))


def test_what_a_transform_draws_is_read_once() -> None:
    draws = itertools.count()
    table = Dataset.from_list([{"a": 1, "left": 0}, {"a": 2, "left": 0}])
    drawn = table.with_transform(lambda batch: {"b": [a * 100 + next(draws) for a in batch["a"]]})
    rows = as_dataset(drawn, "train_dataset")
    assert rows.column_names == ["b"] and rows.format["type"] is None
    assert rows.to_list() == rows.to_list() and [row["b"] // 100 for row in rows] == [1, 2]
    assert as_dataset(table, "train_dataset") is table


def test_a_list_of_rows_has_the_columns_of_all_of_them() -> None:
    rows = as_dataset([{"a": 1}, {"a": 2, "b": "x"}], "train_dataset")
    assert rows.to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    assert len(as_dataset([], "train_dataset")) == 0


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_a_dictionary_of_splits_is_named(kind: type) -> None:
    splits = kind({"train": Dataset.from_list([{"n": 1}]) if kind is DatasetDict else stream(1)})
    with pytest.raises(UserError, match=f"train_dataset is a {kind.__name__} of train; give one of its splits"):
        as_dataset(splits, "train_dataset")
