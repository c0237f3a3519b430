"""Steps 6 to 10 after a resume at step 5: bitwise at the same layout, within rounding at another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import Layout
from tests.ranks import run_ranks
from tests.trainers.layout_runs import OFFLINE, run, save_models
from tests.trainers.runs import metric_lines, without_times

# Where completions are sampled, step 5 is in the middle of a round, whose other steps a checkpoint must keep.
KINDS: dict[str, dict[str, Any]] = {
    "SFT": {"shuffle_dataset": True},
    "DPO": {"shuffle_dataset": True},
    "GRPO": {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1},
    "PPO": {"num_ppo_epochs": 2, "num_mini_batches": 2, "kl_target": 0.5},
}
BEGUN = Layout(dp=2)
ELSEWHERE = [Layout(tp=2, sp=True), Layout(pp=2, vpp=2), Layout(tp=2, cp=2), Layout()]
WITH_EXPERTS = (Layout(dp=2, ep=2), Layout(tp=2, sp=True, etp=1))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return {family: save_models(family, tmp_path_factory.mktemp(family)) for family in ("llama", "qwen3_moe")}


def _run(kind: str, paths: dict[str, str], layout: Layout, directory: Path, **options: Any) -> list[dict[str, Any]]:
    """The log lines of steps 6 to 10."""
    rows = 6 if kind in OFFLINE else 4  # of a step
    fields = {
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 5,
        "use_distributed_optimizer": True,
        "per_device_train_batch_size": rows // layout.dp,
        **KINDS[kind],
        **options,
    }
    run_ranks(layout.world, run, kind, paths, layout, str(directory), fields)
    lines = [line for line in metric_lines(directory) if line["step"] > 5]
    assert [line["step"] for line in lines] == [6, 7, 8, 9, 10]
    return [without_times(line) for line in lines]


def _resumed(kind: str, paths: dict[str, str], layout: Layout, whole: Path, directory: Path) -> list[dict[str, Any]]:
    shutil.copytree(whole / "checkpoint-5", directory / "checkpoint-5")
    shutil.copy(whole / "metrics.jsonl", directory / "metrics.jsonl")
    return _run(kind, paths, layout, directory, resume_from_checkpoint="latest")


def _check(lines: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)
        for name, value in other.items():
            if value is not None:
                assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_after_a_resume(kind: str, models: dict[str, dict[str, str]], tmp_path: Path) -> None:
    paths = models["llama"]
    wanted = _run(kind, paths, BEGUN, tmp_path / "whole")
    assert _resumed(kind, paths, BEGUN, tmp_path / "whole", tmp_path / "again") == wanted
    for layout in ELSEWHERE:
        _check(_resumed(kind, paths, layout, tmp_path / "whole", tmp_path / str(layout)), wanted)


@pytest.mark.parametrize("kind", ["SFT", "GRPO"])
def test_the_steps_after_a_resume_with_experts_elsewhere(
    kind: str, models: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    begun, elsewhere = WITH_EXPERTS
    wanted = _run(kind, models["qwen3_moe"], begun, tmp_path / "whole")
    found = _resumed(kind, models["qwen3_moe"], elsewhere, tmp_path / "whole", tmp_path / "elsewhere")
    _check(found, wanted)
