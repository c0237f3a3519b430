"""Rows prepared once for the job, and what they are known by."""

from __future__ import annotations

import datetime
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from datasets import Dataset, concatenate_datasets, load_from_disk

from megalign.data import prepared
from megalign.data.prepared import code_digest, describe_rows, of_this_code, once_per_job
from megalign.data.rows import ROW_NUMBER
from megalign.errors import UserError
from tests.ranks import RanksError, run_ranks

ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]


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


def slow_to_make(directory: str, seconds: float) -> tuple[list[dict[str, object]], float]:
    def make() -> Dataset:
        time.sleep(seconds)
        return Dataset.from_list(ROWS)

    started = time.monotonic()
    set_timeout, usual = dist.distributed_c10d._set_pg_timeout, datetime.timedelta(seconds=300)
    set_timeout(datetime.timedelta(seconds=6), dist.group.WORLD)
    try:
        rows = once_per_job(make, directory).to_list()
    finally:
        set_timeout(usual, dist.group.WORLD)
    return rows, time.monotonic() - started


def test_rows_may_take_longer_than_a_collective_may(tmp_path: Path) -> None:
    first, second = run_ranks(2, slow_to_make, str(tmp_path), 8.0, fresh=True)
    assert first[0] == second[0] == ROWS
    assert first[1] > 8  # the other may have come late


# ---- what rows are known by


def test_rows_are_known_by_their_content_wherever_they_lie(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"ids": [n, n + 1], "flag": n % 3 == 0, "text": None if n == 5 else str(n)} for n in range(9)]
    )
    rows.save_to_disk(str(tmp_path))
    same = [rows, load_from_disk(str(tmp_path)), rows.select([*range(9)][::-1]).select([*range(9)][::-1])]
    same.append(concatenate_datasets([rows.select(range(4)), rows.select(range(4, 9))]))
    assert len({describe_rows(one) for one in same}) == 1
    other = rows.map(lambda row, n: {"ids": [n, n + (2 if n == 4 else 1)]}, with_indices=True)
    assert describe_rows(other) != describe_rows(rows) and describe_rows(rows).startswith("9 rows ")
    # A row that was left out may be gone when the run goes on: the others have other numbers then.
    numbered = [rows.add_column(ROW_NUMBER, [first + n for n in range(9)]) for first in (0, 1)]
    assert {describe_rows(one) for one in numbered} == {describe_rows(rows)}


# ---- what datasets caches


def test_rows_prepared_by_other_code_are_not_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint() -> str:
        return of_this_code(rows).map(with_two)._fingerprint

    rows = Dataset.from_list(ROWS)
    first = fingerprint()
    assert fingerprint() == first
    monkeypatch.setattr(prepared, "code_digest", lambda: "another version's")
    assert fingerprint() != first
    assert of_this_code(rows).to_list() == ROWS and rows._fingerprint != of_this_code(rows)._fingerprint


def with_two(row: dict[str, object]) -> dict[str, object]:
    return {"n": 2}


def test_the_digest_is_of_the_code_that_makes_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Path(prepared.__file__).parent
    shutil.copytree(room, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(prepared, "__file__", str(tmp_path / "data" / "prepared.py"))
    digest = code_digest.__wrapped__
    assert digest() == code_digest()
    file = tmp_path / "data" / "supervised.py"
    file.write_text(file.read_text() + "\n")
    assert digest() != code_digest()
