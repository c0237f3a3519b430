"""What the jobs share: ratios, limits and memory of the machine, weights of a model, processes that end."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from megalign.errors import UserError
from tests.jobs.inputs import save_model
from tools.benchmarks import engines, machine, report
from tools.benchmarks.models import multiplied_weights


def test_the_ratio_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    # The machine was four times slower during the second pair: 2/1, 12/4 and 3/2 are what may be compared, not 3 and 2.
    assert report.median_ratio([2.0, 12.0, 3.0], [1.0, 4.0, 2.0]) == 2.0


def test_parameters_are_counted_from_the_files_headers(tmp_path: Path) -> None:
    save_model(tmp_path)
    # Tied llama: embedding and final norm; a layer has q, o (48 x 32), k, v (24 x 32), three of the mlp, two norms.
    layer = 2 * 48 * 32 + 2 * 24 * 32 + 3 * 48 * 32 + 2 * 32
    assert multiplied_weights(tmp_path) == 420 * 32 + 32 + 4 * layer
    save_model(tmp_path, tie_word_embeddings=False)
    assert multiplied_weights(tmp_path) == 420 * 32 + 32 + 4 * layer  # an embedding beside the head multiplies nothing


def test_memory_is_what_is_held_for_a_while() -> None:
    size = 64 << 20
    with machine.PeakMemory() as peak:
        torch.ones(size // 4, device=machine.device.device()).sum()
    assert abs(peak.extra - size) < 8 << 20
    with machine.PeakMemory() as again:
        pass
    assert again.extra < 8 << 20  # what was freed before counts no more


def test_limits_are_of_this_machine() -> None:
    limits = machine.measure_limits("float32")
    assert limits.flops == limits.flops_fp32 > 1e8 and limits.copied > 1e8
    assert machine.Limits(2.0, 3.0, 1.0).best_flops == machine.Limits(3.0, 2.0, 1.0).best_flops == 3.0


def _ends_early(pipe: Any) -> None:
    pipe.recv()
    raise RuntimeError("no more")


def test_a_process_that_ends_is_told_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "CONTEXT", multiprocessing.get_context("forkserver"))
    with engines.stopped_at_the_end() as keep:
        worker = keep(engines.Worker("megalign", str(tmp_path), _ends_early))
        with pytest.raises(UserError, match="megalign ended before its step"):
            worker.step()
    assert "RuntimeError: no more" in capsys.readouterr().err
