"""A job really run, small; nothing here looks at a time."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.benchmarks.limits import LIMITS
from tools import benchmark
from tools.benchmarks import engines, machine


@pytest.fixture
def measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Runs a job and returns (its entries, the machine's): with limits that are not measured, and processes that are
    forked where the modules are loaded already."""
    monkeypatch.setattr(machine, "measure_limits", lambda dtype: LIMITS)
    monkeypatch.setattr(engines, "CONTEXT", multiprocessing.get_context("forkserver"))
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # what the job sets goes with the test

    def run(*words: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        file, picture = tmp_path / "result.json", tmp_path / "result.png"
        ends = ["--repetitions", 1, "--threads", 1, "--json", file, "--plot", picture]
        benchmark.main([str(word) for word in [*words, *ends]])
        assert picture.read_bytes().startswith(b"\x89PNG")
        entries = json.loads(file.read_text())
        (made_on,) = {json.dumps(entry.pop("machine")) for entry in entries}
        assert all(entry["job"] == words[0] and len(entry["seconds"]) == 1 for entry in entries)
        return entries, json.loads(made_on)

    return run
