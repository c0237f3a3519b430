"""Rows that cannot be read or learnt from: named one by one, or left out together and counted (skip_bad_rows).

A line of a file that is no row becomes a row all the same, of one column that says what is wrong, so that rows keep
their numbers and all that is left out is counted in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, Value
from transformers.utils import logging

from megalign.data.rows import ROW_NUMBER, Row
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
    """`function(row, index, **options)` of each row, as columns of these `features`, and the row's number (ROW_NUMBER).

    A row that it refuses is an error or, with `skipped`, is left out and noted there.
    """
    kept = {name: kind for name, kind in dataset.features.items() if keep_columns and name not in (BROKEN, ROW_NUMBER)}
    arguments: dict[str, Any] = {
        "with_indices": True,
        "remove_columns": [name for name in dataset.column_names if name not in kept],
        "num_proc": num_proc,
        "desc": desc,
    }
    columns = {**kept, **features, ROW_NUMBER: Value("int64")}
    calling = {"function": function, "options": dict(options)}
    try:
        if skipped is None:
            return dataset.map(_numbered, fn_kwargs=calling, features=Features(columns), **arguments)
        judging = {**calling, "names": list(features)}
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


def _numbered(
    row: Row, index: int, *, function: Callable[..., Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    return {**function(row, index, **options), ROW_NUMBER: index}


def _judged(
    row: Row, index: int, *, function: Callable[..., Mapping[str, Any]], options: Mapping[str, Any], names: list[str]
) -> dict[str, Any]:
    """The function's columns, or none of them and the reason."""
    reason = row.get(BROKEN)
    if reason is None:
        try:
            good = {name: value for name, value in row.items() if name != BROKEN}
            return {**_numbered(good, index, function=function, options=options), _REFUSED: None}
        except UserError as error:
            reason = str(error)
    else:
        reason = f"dataset row {index}: {reason}"
    return {**dict.fromkeys(names), ROW_NUMBER: index, _REFUSED: reason}


def _first_undecodable(dataset: Dataset) -> int:
    for place in range(len(dataset)):
        try:
            _ = dataset[place]
        except UnicodeDecodeError:
            return place
    return 0
