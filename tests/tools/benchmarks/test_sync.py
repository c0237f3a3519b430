"""Weights into vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.inputs import save_model
from tools.benchmarks import sync


@pytest.mark.vllm
def test_weights_into_vllm_beside_a_copy(tmp_path: Path, measured: Callable[..., Any]) -> None:
    model = save_model(tmp_path / "model", head_dim=32)  # a size that vLLM knows
    words = ["--model", model, "--dtype", "float32", "--kv-cache-gib", 0.0625]
    entries, _ = measured("sync", *words)
    nbytes = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert [entry["what"] for entry in entries] == list(sync.WAYS)
    assert all(0.9 * nbytes < entry["bytes"] <= nbytes for entry in entries)
    assert entries[0]["ratio"] == pytest.approx(entries[1]["median_s"] / entries[0]["median_s"])
    assert entries[1]["ratio"] == 1.0
