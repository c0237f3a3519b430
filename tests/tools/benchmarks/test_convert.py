"""Conversions of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.tools.benchmarks.limits import LIMITS


def test_conversions_beside_a_copy(measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.benchmarks import convert

    monkeypatch.setattr(convert, "measure_limits", lambda dtype: LIMITS)
    monkeypatch.setitem(convert.SHAPES, "1b", (2, 64, 128, 4, 2, 512))
    entries, _ = measured("convert", "--shape", "1b")
    assert [entry["what"] for entry in entries] == list(convert.WHATS)
    assert entries[0]["ratio"] == 1.0 and all(entry["peak_anon"] > 1e6 for entry in entries[1:])
