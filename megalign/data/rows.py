"""A dataset row, and the error of one that lacks a column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalign.errors import UserError

Row = Mapping[str, Any]


def needed(row: Row, name: str) -> Any:
    """The row's value, which must be there; the caller adds the row's number to the error."""
    if row.get(name) is None:
        there = ", ".join(repr(key) for key in row if row[key] is not None)
        raise UserError(f"it has no {name!r}, only {there}; fill it in or drop the row")
    return row[name]
