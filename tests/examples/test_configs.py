"""The YAML files and the quickstart's task."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from megalign.cli import read_yaml
from megalign.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    LoopConfig,
    ORPOConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
)
from tests.jobs.start import ROOT, run

# File, config, ranks, and the data-parallel replicas that its comment promises.
CONFIGS = [
    ("examples/sft.yaml", SFTConfig, 2, 1),
    ("examples/reward.yaml", RewardConfig, 2, 1),
    ("examples/dpo.yaml", DPOConfig, 2, 1),
    ("examples/kto.yaml", KTOConfig, 2, 1),
    ("examples/orpo.yaml", ORPOConfig, 2, 1),
    ("examples/ppo.yaml", PPOConfig, 2, 1),
    ("examples/grpo.yaml", GRPOConfig, 2, 1),
    ("examples/rloo.yaml", RLOOConfig, 2, 1),
    ("examples/slurm/sft_8b.yaml", SFTConfig, 8, 2),
    ("examples/slurm/grpo_8b.yaml", GRPOConfig, 8, 2),
    ("examples/slurm/grpo_70b.yaml", GRPOConfig, 64, 2),
]


def test_every_yaml_file_is_in_the_table() -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.yaml")}
    assert found == {name for name, *_ in CONFIGS}


@pytest.mark.parametrize(("name", "config", "ranks", "replicas"), CONFIGS)
def test_a_yaml_file_is_valid_for_its_ranks(name: str, config: type[LoopConfig], ranks: int, replicas: int) -> None:
    args = config(**read_yaml(config, str(ROOT / name)))
    args.validate(ranks)
    assert args.data_parallel_size(ranks) == replicas


def test_prompts_in_a_70b_step_are_as_its_comment_says() -> None:
    args = GRPOConfig(**read_yaml(GRPOConfig, str(ROOT / "examples/slurm/grpo_70b.yaml")))
    assert args.completions_per_generation(2) == 64 * 16


def test_held_out_sums_are_never_trained_on_in_either_order() -> None:
    sums = runpy.run_path(str(ROOT / "examples/quickstart/sums.py"))
    train, held_out = sums["split"]()
    questions = [{row["prompt"][1]["content"] for row in side} for side in (train, held_out)]
    turned = {f"{text[4]} + {text[0]} = ?" for text in questions[1]}
    assert len(questions[0]) + len(questions[1]) == 100
    assert turned == questions[1]
    assert not questions[0] & questions[1]


def test_sum_reward_reads_the_last_number() -> None:
    sums = runpy.run_path(str(ROOT / "examples/quickstart/sums.py"))
    texts = ["3 + 4 = 7", "The answer is 7.", "7 = 3 + 4", "seven", "77"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert sums["sum_reward"](completions, [7] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_quickstart_reads_its_flags_before_it_deletes(tmp_path: Path) -> None:
    for name in ("quickstart.sh", "quickstart/options.py"):
        (tmp_path / "examples" / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples" / name)
    result = tmp_path / "quickstart" / "result.json"
    result.parent.mkdir()
    result.write_text("{}")
    script = ["bash", str(tmp_path / "examples" / "quickstart.sh")]
    told = {
        ("--stepz", "3"): "unrecognized arguments: --stepz 3",
        ("--steps", "three"): "--steps: invalid int value: 'three'",
        ("--step", "3"): "unrecognized arguments: --step 3",
    }
    for words, message in told.items():
        ended = run([*script, *words], tmp_path, PYTHON=sys.executable)
        (line,) = ended.stderr.splitlines()
        assert (ended.status, ended.stdout) == (2, "") and line.startswith("megalign: error: ") and message in line
    ended = run([*script, "--steps", "3", "--help"], tmp_path, PYTHON=sys.executable)
    assert (ended.status, ended.stderr) == (0, "") and "--learning-rate" in ended.stdout
    assert result.exists()
    # The flags are right here, so it goes on to the installation.
    assert "tools/install.sh" in run([*script, "--steps", "3"], tmp_path, PYTHON=sys.executable).stderr


def test_scripts_find_the_repository_from_anywhere() -> None:
    for script in ("examples/quickstart.sh", "tools/install.sh", "tests/run.sh", ".ci/run"):
        text = (ROOT / script).read_text()
        assert 'cd "$(dirname "${BASH_SOURCE[0]}")/.."' in text, script
        assert Path(ROOT / script).stat().st_mode & 0o111, script
