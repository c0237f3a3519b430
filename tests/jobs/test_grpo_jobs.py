"""GRPO as users start it, with vLLM in the ranks: a script of their own, and the command line."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.jobs.inputs import save_model, sums, write_rows, write_yaml
from tests.jobs.start import run, torchrun
from tests.tiny import load_reference
from tests.trainers.runs import metric_lines

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).with_name("grpo_script.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    # vLLM's CPU kernels know no smaller head than 32.
    return save_model(tmp_path_factory.mktemp("model"), hidden_size=128, head_dim=32)


@pytest.fixture(scope="module")
def out(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script leaves, run on two pipeline stages from another directory."""
    here = tmp_path_factory.mktemp("somewhere")
    (here / "out").mkdir()
    run(torchrun(2, SCRIPT, model, here / "out"), here).succeeded()
    return here / "out"


@pytest.fixture(scope="module")
def told(out: Path) -> dict[str, Any]:
    return json.loads((out / "told.json").read_text())


def judged(out: Path) -> list[tuple[str, str, int, str]]:
    """(rank, prompt, answer, completion) of every line of the bill."""
    return [tuple(json.loads(line)) for line in (out / "judged.txt").read_text().splitlines()]


def test_every_completion_is_judged_once_in_the_job(out: Path) -> None:
    bill = judged(out)
    rounds, evaluations = 3 * 8, 2 * 6 * 2
    assert len(bill) == rounds + evaluations
    assert {rank for rank, *_ in bill} == {"0"}
    assert all(answer == eval(prompt.removesuffix(" = ")) for _, prompt, answer, _ in bill)
    counts = Counter((prompt, text) for _, prompt, _, text in bill)
    for step in (1, 2, 3):
        table = pq.read_table(out / "completions" / f"completions_{step:05d}.parquet").to_pydict()
        counts -= Counter(zip(table["prompt"], table["completion"], strict=True))
    assert counts.total() == evaluations


def test_completions_are_a_table_with_rewards_and_advantages(out: Path) -> None:
    table = pq.read_table(out / "completions" / "completions_00003.parquet").to_pydict()
    columns = ["step", "prompt", "completion", "few_distinct_letters", "ended", "advantage"]
    assert list(table) == columns
    assert table["prompt"] == [prompt for prompt in dict.fromkeys(table["prompt"]) for _ in range(4)]
    assert len(table["prompt"]) == 8
    assert table["few_distinct_letters"] == [-float(len(set(text))) for text in table["completion"]]
    assert all(value == 1.0 or math.isnan(value) for value in table["ended"])
    assert abs(sum(table["advantage"][:4])) < 1e-5


def test_the_history_and_the_metrics_file_say_the_same(out: Path, told: dict[str, Any]) -> None:
    lines = metric_lines(out)
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 3]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3] and told["global_step"] == 3 == told["steps"]
    history = [line for line in told["history"] if "loss" in line]
    assert [line["reward"] for line in history] == [line["reward"] for line in training]
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-3 for line in training)
    evaluations = [line["eval_reward"] for line in lines if "eval_reward" in line]
    assert told["evaluations"] == evaluations == [evaluations[0], told["evaluate"]["eval_reward"]]


def test_the_saved_model_loads_and_has_learned(out: Path, model: str) -> None:
    saved, before = load_file(out / "saved" / "model.safetensors"), load_file(Path(model) / "model.safetensors")
    root = load_file(out / "model.safetensors")
    assert saved.keys() == before.keys() == root.keys()
    assert all(torch.equal(saved[name], root[name]) for name in saved)
    assert any((saved[name] - before[name]).abs().max() > 1e-3 for name in saved)
    load_reference(str(out / "saved"))
    assert (out / "saved" / "tokenizer.json").exists()


def test_tensorboard_has_the_curves(out: Path, told: dict[str, Any]) -> None:
    # evaluate() after train() opens a second file in the same directory.
    (directory,) = {file.parent for file in out.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(directory))
    events.Reload()
    rewards = [event.value for event in events.Scalars("train/reward")]
    assert rewards == pytest.approx([line["reward"] for line in told["history"] if "loss" in line])
    assert [event.value for event in events.Scalars("eval/reward")] == pytest.approx(told["evaluations"])


REWARD = """
import os

calls = 0

def third_time_unlucky(completions, **kwargs):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        raise ConnectionError("the judge\\nhas left")
    return [float(len(text)) for text in completions]
"""


def test_the_command_line_trains_until_a_reward_function_fails_on_one_rank(model: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", sums(8))
    (tmp_path / "rewards.py").write_text(REWARD)
    fields = {
        "model_name_or_path": model,
        "dataset_name": "rows.jsonl",
        "output_dir": "out",
        "reward_funcs": ["rewards.py:third_time_unlucky"],
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 5,
        "logging_steps": 1,
        "vllm_max_model_length": 64,
        "vllm_cpu_kv_cache_gib": 0.0625,
    }
    write_yaml(tmp_path / "run.yaml", **fields)
    command = ["-m", "megalign", "grpo", "--config", "run.yaml", "--vllm-tensor-parallel-size", 2]
    ended = run(torchrun(2, *command), tmp_path)
    assert ended.status != 0 and 2 in ended.rank_statuses, ended.stderr
    (line,) = ended.error_lines
    told = "reward function 'third_time_unlucky': it raised ConnectionError: the judge has left"
    rule = "it must return a number or None for each completion"
    assert line == f"megalign: error: {told} at {tmp_path / 'rewards.py'}:10; {rule}"
    assert "megalign/" not in ended.stderr.replace(line, ""), ended.stderr
    lines = metric_lines(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["reward"] > 0 for line in lines)
