"""tools/parity_matrix.py: rows that are computed, a table of them, and a status that a wrong model changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import parity
from tools import parity_matrix


def test_rows_table_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "matrix.json"
    words = ["--json", str(file), "--families", "llama", "mixtral", "--layouts", "one rank", "EP2"]
    assert parity_matrix.main(words) == 0
    rows = json.loads(file.read_text())
    assert [(row["family"], row["layout"]) for row in rows] == [
        ("llama", "one rank"),
        ("mixtral", "one rank"),
        ("mixtral", "EP2"),  # llama has no experts
    ]
    assert all(0 < row["max_abs_diff"] < 1e-4 and row["mcore"] for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "| family | one rank | EP2 |" and lines[2].startswith("| llama | ") and lines[2].endswith(" |  |")
    )


def test_a_difference_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = parity.reference_logprobs
    monkeypatch.setattr(parity, "reference_logprobs", lambda path: {i: x + 1e-3 for i, x in wanted(path).items()})
    words = ["--json", str(tmp_path / "m.json"), "--families", "llama", "--layouts", "one rank"]
    assert parity_matrix.main(words) == 1
    assert "is not under 0.0001" in capsys.readouterr().err
