"""A .jsonl file line by line, for what the JSON reader refuses: its rows, and what is wrong with the other lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalign.data.broken import BROKEN


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
