"""Whole runs on a GPU: the eight trainers' numbers are those of a CPU in fp32, and bf16 trains."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.by_hand import worst
from tests.jobs.inputs import save_model, sums, write_rows
from tests.jobs.start import megalign, run
from tests.layouts import ONE_RANK
from tests.ranks import run_ranks
from tests.trainers import layout_runs
from tests.trainers.layout_runs import OFFLINE, ONLINE
from tests.trainers.test_layouts import save_models

PLAIN = {"transformer_impl": "local"}
# vLLM's place is taken by a stand-in, but these trainers do not begin without it.
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
KINDS = [*OFFLINE, *(pytest.param(kind, marks=needs_vllm) for kind in ONLINE)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Of a family: a policy, a reference that differs from it everywhere, a reward model with its tokenizer."""
    return {family: save_models(family, tmp_path_factory.mktemp(family)) for family in ("llama", "qwen3_moe")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_every_trainer_logs_what_it_logs_on_a_cpu(
    paths: dict[str, dict[str, str]], tmp_path: Path, family: str, kind: str
) -> None:
    given = (kind, paths[family], ONE_RANK)
    (wanted,) = run_ranks(1, layout_runs.run, *given, str(tmp_path / "cpu"), PLAIN, on_cpu=True)
    (found,) = run_ranks(1, layout_runs.run, *given, str(tmp_path / "gpu"), PLAIN)
    for mine, theirs in zip(found["lines"], wanted["lines"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            is_speed = name.startswith("perf/") or "time" in name or "per_second" in name
            if not isinstance(value, (int, float)) or is_speed:
                continue
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    for engine, gradients in wanted["gradients"].items():
        difference, name = worst(found["gradients"][engine], gradients)
        assert difference < 1e-3, (engine, name, difference)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_takes_steps_in_bf16(paths: dict[str, dict[str, str]], tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"bf16": True, "activation_offloading": True}
    if kind in ONLINE:
        options["vllm_enable_sleep_mode"] = True
    (found,) = run_ranks(1, layout_runs.run, kind, paths["llama"], ONE_RANK, str(tmp_path), options)
    assert found["lines"]
    for line in found["lines"]:
        assert all(math.isfinite(value) for name, value in line.items() if "loss" in name or "grad_norm" in name)
    assert all(torch.isfinite(tensor).all() for part in found["gradients"].values() for tensor in part.values())


def test_the_sft_command_learns_in_bf16(tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model", "qwen2"), write_rows(tmp_path / "rows.jsonl", sums(32))
    words = {
        "model_name_or_path": model,
        "dataset_name": rows,
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 16,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "recompute_granularity": "full",
        "activation_offloading": "true",
        "bf16": "true",
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    told = run(megalign("sft", *flags), tmp_path).succeeded().stderr
    print(told.splitlines()[0])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print("losses", losses)
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    with safe_open(tmp_path / "run/model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}
