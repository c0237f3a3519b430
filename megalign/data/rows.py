"""A dataset row, and the errors of one that lacks a column or holds tokens that the model has not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from megalign.errors import UserError

Row = Mapping[str, Any]

# Said, not inferred: the first rows may be empty, and rows of other types would then be refused.
TOKENS, MASK = List(Value("int64")), List(Value("bool"))

# The column of prepared rows that says which rows of the user's dataset they are: preparing leaves rows out, takes them
# apart and shuffles them. A number or, of a pack, a list of them; only for what is said, nothing is computed from it.
ROW_NUMBER = "megalign_row"


def numbers_of(row: Row) -> list[int]:
    """Which rows of the user's dataset the prepared row is made of."""
    return np.ravel(row[ROW_NUMBER]).tolist()  # numpy's or torch's, where the dataset's format is theirs


def without_numbers(rows: Dataset) -> Dataset:
    """What of prepared rows is learnt from."""
    return rows.remove_columns(ROW_NUMBER) if ROW_NUMBER in rows.column_names else rows


@contextmanager
def naming_row(index: int) -> Iterator[None]:
    """An error within names the dataset's row by its number, counted from 0."""
    try:
        yield
    except UserError as error:
        raise UserError(f"dataset row {index}: {error}") from error


def needed(row: Row, name: str) -> Any:
    """The row's value, which must be there; the caller adds the row's number to the error."""
    if row.get(name) is None:
        there = ", ".join(repr(key) for key in row if row[key] is not None)
        raise UserError(f"it has no {name!r}, only {there}; fill it in or drop the row")
    return row[name]


def needed_ids(row: Row, name: str) -> list[int]:
    """The row's token ids, which must be there and whole numbers."""
    ids = _listed(row, name)
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise UserError(f"{name} must be whole numbers and is {token!r} at place {place}; mend the row")
    return ids


def mask_bits(row: Row, name: str, length: int) -> list[bool]:
    """The row's mask, which must be 0 or 1 for each of `length` tokens."""
    bits = as_long(row, name, length)
    for place, bit in enumerate(bits):
        if bit not in (0, 1):  # equal to False and True
            raise UserError(f"{name} must be 0 or 1 at each place and is {bit!r} at place {place}; mend the row")
    return [bool(bit) for bit in bits]


def as_long(row: Row, name: str, length: int) -> list[Any]:
    """The row's list, which must have a value for each of `length` tokens."""
    values = _listed(row, name)
    if len(values) != length:
        raise UserError(f"{name} has {len(values)} values for {length} input_ids; give one for each")
    return values


def _listed(row: Row, name: str) -> list[Any]:
    values = needed(row, name)
    if hasattr(values, "tolist"):  # a dataset whose format is that of numpy or torch
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise UserError(f"{name} must be a list with a value for each token, not {type(values).__name__}; mend the row")
    return list(values)


def check_tokens(ids: Sequence[int], vocab_size: int | None) -> None:
    """UserError for an id that the model has no embedding of; the caller adds the row's number to the error.

    Nobody else would notice: a tensor-parallel embedding takes the id for another rank's and answers with zeros.
    """
    if vocab_size is None or not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    place, token = next((place, token) for place, token in enumerate(ids) if not 0 <= token < vocab_size)
    raise UserError(
        f"token id {token} at place {place} must be from 0 to {vocab_size - 1}, the model's vocab_size being "
        f"{vocab_size}; tokenize with the model's own tokenizer"
    )
