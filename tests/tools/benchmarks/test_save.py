"""Checkpoints of a run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.jobs.inputs import save_model
from tests.ranks import run_ranks
from tests.tools.benchmarks.limits import LIMITS
from tools import benchmark
from tools.benchmarks import machine


def saved_entries(words: list[str]) -> None:
    """On a rank: the job begins and ends torch.distributed itself."""
    machine.measure_limits = lambda dtype: LIMITS
    benchmark.main(words)


def test_checkpoints_by_the_rank_and_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "save.json"
    words = ["save", "--model", save_model(tmp_path / "model"), "--json", file, "--repetitions", 1, "--threads", 1]
    run_ranks(1, saved_entries, [str(word) for word in words], fresh=True)
    entries = json.loads(file.read_text())
    assert [(entry["job"], entry["what"]) for entry in entries] == [
        ("save", "the rank"),
        ("save", "processes beside it"),
    ]
    assert entries[0]["ratio"] == 1.0 and all(0 < entry["held"] <= entry["written"] for entry in entries)
