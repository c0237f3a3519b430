"""Rows that cannot be read or learnt from: named one by one, or left out together and counted (skip_bad_rows).

A line of a file that is no row becomes a row all the same, of one column that says what is wrong, so that rows keep
their numbers and all that is left out is counted in one place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from transformers.utils import logging

from megalign.data.rows import Row
from megalign.errors import UserError

logger = logging.get_logger(__name__)

BROKEN = "megalign_broken"  # the column of a line that is no row: why it is none
_REFUSED = "megalign_refused"
_SHOWN = 3


@dataclass
class Skipped:
    """What skip_bad_rows has left out of a dataset."""

    total: int = 0  # rows, those left out among them
    count: int = 0
    first: list[str] = field(default_factory=list)  # what was wrong with the first of them

    def note(self, reasons: list[str | None]) -> None:
        """Takes the reason for each row, None for a good one; rows that are all bad are an error."""
        bad = [reason for reason in reasons if reason is not None]
        self.total, self.count, self.first = len(reasons), len(bad), bad[:_SHOWN]
        if self.count and self.count == self.total:
            raise UserError(f"skip_bad_rows leaves none of {self.total} rows; the first of them: {bad[0]}")
        if self.count:
            more = f"; and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            told = "; ".join(self.first)
            logger.warning("%d of %d rows are left out (skip_bad_rows): %s%s", self.count, self.total, told, more)


def map_rows(
    dataset: Dataset,
    function: Callable[..., Mapping[str, Any]],
    *,
    features: Mapping[str, Any],
    options: Mapping[str, Any],
    skipped: Skipped | None,
    desc: str,
    num_proc: int | None = None,
    keep_columns: bool = False,
) -> Dataset:
    """`function(row, index, **options)` of each row, as columns of these `features`.

    A row that it refuses is an error or, with `skipped`, is left out and noted there.
    """
    kept = {name: kind for name, kind in dataset.features.items() if keep_columns and name != BROKEN}
    arguments: dict[str, Any] = {
        "with_indices": True,
        "remove_columns": [name for name in dataset.column_names if name not in kept],
        "num_proc": num_proc,
        "desc": desc,
    }
    columns = {**kept, **features}
    try:
        if skipped is None:
            return dataset.map(function, fn_kwargs=dict(options), features=Features(columns), **arguments)
        judging = {"function": function, "options": dict(options), "names": list(features)}
        judged = dataset.map(
            _judged, fn_kwargs=judging, features=Features({**columns, _REFUSED: Value("string")}), **arguments
        )
    except UnicodeDecodeError as error:
        raise UserError(
            f"dataset row {_first_undecodable(dataset)}: its text is not UTF-8 ({error}); write the file anew in UTF-8"
        ) from error
    reasons = list(judged[_REFUSED])
    skipped.note(reasons)
    if skipped.count:
        judged = judged.select([place for place, reason in enumerate(reasons) if reason is None])
    return judged.remove_columns(_REFUSED)


def _judged(
    row: Row, index: int, *, function: Callable[..., Mapping[str, Any]], options: Mapping[str, Any], names: list[str]
) -> dict[str, Any]:
    """The function's columns, or none of them and the reason."""
    reason = row.get(BROKEN)
    if reason is None:
        try:
            good = {name: value for name, value in row.items() if name != BROKEN}
            return {**function(good, index, **options), _REFUSED: None}
        except UserError as error:
            reason = str(error)
    else:
        reason = f"dataset row {index}: {reason}"
    return {**dict.fromkeys(names), _REFUSED: reason}


def _first_undecodable(dataset: Dataset) -> int:
    for place in range(len(dataset)):
        try:
            _ = dataset[place]
        except UnicodeDecodeError:
            return place
    return 0


# ---- lines of JSON


def rows_of_lines(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file; a line that is none gives a row with the column BROKEN."""
    for number, line in _lines(path):
        row, reason = _row_of(line)
        yield {BROKEN: f"line {number} {reason}"} if row is None else row


def first_broken_line(path: str) -> str | None:
    """What is wrong with the first line that is no row, and whether the file ends with it; None where all are rows."""
    found = None
    for number, line in _lines(path):
        if found is not None:
            return found
        reason = _row_of(line)[1]
        found = None if reason is None else f"line {number} {reason}"
    return None if found is None else f"{found} (the file ends with it: it may have been cut)"


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers from 1."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _row_of(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_doubles)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:  # json's and Unicode's errors are ValueErrors
        return None, f"is no JSON ({' '.join(str(error).split())[:200]})"
    if not isinstance(row, dict):
        return None, f"is a {type(row).__name__} and no mapping of columns to values"
    return row, None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return row
