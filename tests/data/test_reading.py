"""Datasets from files and directories, and preparation once for the job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from datasets import Dataset, DatasetDict

from megalign.config import SFTConfig
from megalign.data.reading import load_rows, load_split, once_per_job
from megalign.errors import UserError
from tests.ranks import RanksError, run_ranks

ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]


def write(path: Path, rows: list[dict[str, object]] = ROWS) -> str:
    dataset = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".csv":
        dataset.to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_a_file_is_its_train_split(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows.{suffix}")
    assert load_split(SFTConfig(dataset_name=path), "train").to_list() == ROWS
    with pytest.raises(UserError, match="no split 'test'.*eval_dataset_name"):
        load_split(SFTConfig(dataset_name=path), "test")


def test_rows_to_evaluate_on_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:1])
    args = SFTConfig(dataset_name=path, eval_dataset_name=held_out)
    assert load_split(args, "test").to_list() == ROWS[:1]
    assert load_split(args, "train").to_list() == ROWS


def test_a_directory_of_files_has_the_splits_that_they_are_named_for(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[1:])
    assert load_rows(str(tmp_path), split="train").to_list() == ROWS
    assert load_rows(str(tmp_path), split="test").to_list() == ROWS[1:]


def test_directories_of_save_to_disk_are_read(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "one"), split="train").to_list() == ROWS
    assert load_rows(str(tmp_path / "two"), split="test").to_list() == ROWS[1:]


def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    cases = {
        "nosuch.jsonl": "does not exist",
        "nosuch": "does not exist",
        "empty": "holds no .jsonl",
        "rows.txt": "ends in '.txt'",
        "broken.jsonl": "cannot be read as json",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_rows(str(tmp_path / name), split="train")
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="dataset_name is missing"):
        load_split(SFTConfig(), "train")


def test_alone_the_dataset_is_made_and_nothing_is_written(tmp_path: Path) -> None:
    assert once_per_job(lambda: Dataset.from_list(ROWS), str(tmp_path)).to_list() == ROWS
    assert list(tmp_path.iterdir()) == []


def made_once(directory: str) -> tuple[list[dict[str, object]], bool]:
    made = []

    def make() -> Dataset:
        made.append(dist.get_rank())
        return Dataset.from_list(ROWS).map(lambda row: {"n": row["n"] + 1})

    rows = once_per_job(make, directory)
    assert rows.cache_files, "the rows are not mapped from a file"
    return rows.to_list(), bool(made)


def test_rank_0_makes_the_dataset_and_every_rank_has_it(tmp_path: Path) -> None:
    results = run_ranks(2, made_once, str(tmp_path))
    assert [made for _, made in results] == [True, False]
    assert results[0][0] == results[1][0] == [{"text": "one", "n": 2}, {"text": "two", "n": 3}]
    saved = list((tmp_path / ".tokenized").iterdir())
    assert len(saved) == 1 and saved[0].suffix != ".partial"


def refused(directory: str) -> str:
    def make() -> Dataset:
        raise UserError(f"rank {dist.get_rank()} says no")

    try:
        once_per_job(make, directory)
    except UserError as error:
        return str(error)
    return "no error"


def test_an_error_of_rank_0_is_every_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, refused, str(tmp_path)) == ["rank 0 says no"] * 2


def broken(directory: str) -> None:
    def make() -> Dataset:
        raise KeyError("a bug")

    once_per_job(make, directory)


def test_a_bug_on_rank_0_leaves_no_rank_waiting(tmp_path: Path) -> None:
    with pytest.raises(RanksError) as caught:
        run_ranks(2, broken, str(tmp_path), timeout=60, fresh=True)
    assert "a bug" in str(caught.value) and "rank 0 failed to prepare" in str(caught.value)
