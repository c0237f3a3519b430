"""Rows of Python and of streams as a table, and why rows cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from datasets.arrow_writer import OptimizedTypedSequence
from pyarrow.lib import ArrowException
from transformers.utils import logging

from megalign.data.broken import BROKEN
from megalign.errors import UserError

logger = logging.get_logger(__name__)

_LONGEST = 300  # characters of a reason: some list all that would be right
_NO_ROWS = ("corresponds to no data", "No columns to parse", "file size is 0 bytes")


def reason_of(error: BaseException) -> str:
    """Why rows cannot be read, in the first line of the reader's own words; that there are none, in ours."""
    lines = str(error.__cause__ or error).strip().splitlines() or [""]
    if isinstance(error, StopIteration) or any(words in lines[0] for words in _NO_ROWS):
        return "it holds no rows"
    return lines[0][:_LONGEST]


def take_rows(
    stream: IterableDataset,
    count: int | None,
    *,
    shuffle: bool = False,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> Dataset:
    """The first `count` rows of a stream, or all that it has, held in memory; `shuffle` is datasets' own, within a
    buffer of 1000 rows.

    A run of max_steps needs max_steps times the rows of a step. A stream that ends before is gone through again,
    epoch after epoch, like any dataset.
    """
    stream = stream.shuffle(seed=seed) if shuffle else stream
    try:
        rows = list(islice(stream, count))
    # pyarrow's: a line that is no JSON, a column that changes its type, a page of a .parquet file that is torn
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"the streamed rows cannot be read: {reason_of(error)}; mend or replace the file, or (of a .jsonl file) "
            "leave its bad lines out with skip_bad_rows"
        ) from error
    if count is not None and 0 < len(rows) < count:
        logger.warning("the stream ends after %d of the %d rows that max_steps takes: it begins anew", len(rows), count)
    return as_table(rows, features=stream.features, skip_bad_rows=skip_bad_rows)


_NO_COLUMN = (ArrowException, ValueError, TypeError, OverflowError)  # pyarrow's own errors, and Python's in it


def as_table(
    rows: Sequence[Mapping[str, Any]], *, features: Features | None = None, skip_bad_rows: bool = False
) -> Dataset:
    """Rows as a dataset with the columns of all of them; a row without a column has None there.

    A column has one type: rows that differ in it are an error that names the first of them or, with `skip_bad_rows`,
    are rows of one column (BROKEN) that says so.
    """
    kept = list(rows)
    while True:
        try:
            return _one_table(kept, features)
        except _MisfitsError as error:
            if not skip_bad_rows or (features is not None and BROKEN not in features):
                row = min(error.texts)
                raise UserError(f"dataset row {row}: {error.texts[row]}") from error
            for row, text in error.texts.items():
                kept[row] = {BROKEN: text}


class _MisfitsError(Exception):
    """Rows whose values do not go into one column with those before them, and why."""

    def __init__(self, texts: dict[int, str]) -> None:
        super().__init__(f"{len(texts)} rows")
        self.texts = texts


def _one_table(rows: Sequence[Mapping[str, Any]], features: Features | None) -> Dataset:
    names = features or dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        table = _validated(columns, features)
        if features is None and any(map(_has_mappings, table.features.values())):
            # Else each mapping, a tool's arguments too, would get the keys of all others, without a value. As it is
            # read from a .jsonl; it alone would take any two types for one column.
            return _validated(columns, None, on_mixed_types="use_json")
        return table
    except _NO_COLUMN as error:
        for name, values in columns.items():
            kind = None if features is None else Features({name: features[name]})
            if misfits := _misfits(values, name, kind):
                texts = {
                    row: f"its {name!r} does not go into one column with the rows before it ({reason}); give the "
                    "column one type in all rows"
                    for row, reason in misfits.items()
                }
                raise _MisfitsError(texts) from error
        raise


def _has_mappings(kind: Any) -> bool:
    return isinstance(kind, Mapping) or (hasattr(kind, "feature") and _has_mappings(kind.feature))


def _validated(columns: Mapping[str, list[Any]], features: Features | None, **options: str) -> Dataset:
    """The columns as a table. Bytes beside text become text that is not UTF-8: found out here, not when it is read."""
    table = Dataset.from_dict(columns, features=features, **options)
    table.data.table.validate(full=True)
    return table


def _misfits(values: list[Any], name: str, kind: Features | None) -> dict[int, str]:
    """Why each of these rows goes into no column (of this kind, where one is given) with those before it."""
    column = _Column(name, kind)
    if isinstance(column.kind_of(values), str):
        column.judge(values)
        if not column.misfits:  # what went well before the type was known: large integers before the first fraction
            column.judge(values)
    return column.misfits


class _Column:
    """The type of a column, known from the few values that have brought it about: of any number of misfits each is
    found without a look at all the rows before it."""

    def __init__(self, name: str, kind: Features | None) -> None:
        self.misfits: dict[int, str] = {}
        self._name, self._given = name, kind
        self._kind: pa.DataType | None = None
        self._sample: list[Any] = []

    def judge(self, values: list[Any], first: int = 0) -> None:
        """Halves what does not go with the sample, or changes the column's type, down to the rows that do."""
        kind = self.kind_of([*self._sample, *values])
        if kind == self._kind:
            return
        if len(values) > 1:
            half = len(values) // 2
            self.judge(values[:half], first)
            self.judge(values[half:], first + half)
        elif isinstance(kind, str):
            self.misfits[first] = kind
        else:
            self._kind = kind
            self._sample += values

    def kind_of(self, values: list[Any]) -> pa.DataType | str:
        """The type of a column of these values, or why there is none.

        As Dataset.from_dict makes one; a fingerprint, which it makes as well, costs five milliseconds each time.
        """
        name, given, kind = self._name, self._given, None
        try:
            if given is not None:
                values, kind = given.encode_column(values, name), given[name]
            column = pa.array(OptimizedTypedSequence(values, type=kind, col=name))
            column.validate(full=True)
        except _NO_COLUMN as error:
            return reason_of(error)
        return column.type
