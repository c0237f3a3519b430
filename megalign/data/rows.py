"""A dataset row, and the errors of one that lacks a column or holds tokens that the model has not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import List, Value

from megalign.errors import UserError

Row = Mapping[str, Any]

# Said, not inferred: the first rows may be empty, and rows of other types would then be refused.
TOKENS, MASK = List(Value("int64")), List(Value("bool"))


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
