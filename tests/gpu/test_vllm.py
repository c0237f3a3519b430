"""vLLM on the GPU of the rank: what it samples is the given weights', and asleep it holds nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.inputs import save_model, sums, write_rows
from tests.jobs.start import megalign, run
from tests.ranks import run_ranks
from tests.rollout.test_vllm_engine import logprob_difference, make_model
from tests.rollout.vllm_ranks import observe
from tests.trainers.runs import metric_lines

pytestmark = [pytest.mark.cuda_only, pytest.mark.vllm]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tied embeddings and biases, fp32, one engine."""
    path = make_model("qwen2", tmp_path_factory.mktemp("qwen2"))
    (rank,) = run_ranks(1, observe, path, 1)
    print("seconds", {name: round(value, 2) for name, value in rank["seconds"].items()})
    return {"path": path, **rank}


def test_logprobs_are_those_of_transformers_with_the_weights_that_came_last(seen: dict[str, Any]) -> None:
    for name, weights in (("second", 2), ("after_sleep", 2)):
        found = logprob_difference(seen["path"], weights, None, seen[name])
        print("mean difference of a logprob, fp32", name, f"{found:.1e}")
        # Its attention multiplies fp32 in TF32.
        assert found < 2e-3
        assert logprob_difference(seen["path"], 3 - weights, None, seen[name]) > 0.1


def test_seeds_repeat_a_sample_before_and_after_sleep(seen: dict[str, Any]) -> None:
    for one, other in (("again", "first"), ("after_sleep", "second")):
        assert [each.completion_ids for each in seen[one]] == [each.completion_ids for each in seen[other]]
    assert len({tuple(each.completion_ids) for each in seen["first"]}) == 7
    assert seen["state_kept"] and seen["state_kept_by_generate"]


def test_a_sleeping_engine_gives_its_memory_to_the_driver(seen: dict[str, Any]) -> None:
    given = seen["resident_awake"] - seen["resident_asleep"]
    wanted = seen["weights_and_cache"]
    print("sleep", {"held GiB": round(wanted / 2**30, 2), "given back": round(given / 2**30, 2)})
    assert given > 0.98 * wanted > 2**30
    assert seen["asleep"].startswith("AssertionError") and "kv_cache" in seen["half_asleep"]


REWARD = """
def short(completions, **kwargs):
    return [-float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_grpo_trains_with_vllm_in_the_rank_and_both_engines_take_turns(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", family, hidden_size=128, head_dim=32)
    write_rows(tmp_path / "rows.jsonl", sums(8))
    (tmp_path / "rewards.py").write_text(REWARD)
    words = {
        "model_name_or_path": model,
        "dataset_name": "rows.jsonl",
        "output_dir": "out",
        "reward_funcs": "rewards.py:short",
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 16,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": "true",
        "vllm_max_model_length": 64,
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_enable_sleep_mode": "true",
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    run(megalign("grpo", *flags), tmp_path).succeeded()
    lines = [line for line in metric_lines(tmp_path / "out") if "loss" in line]
    for line in lines:
        print(
            {name: value for name, value in line.items() if name.startswith(("perf/", "sampling/")) or name == "step"}
        )
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        # bf16 in both engines, by other kernels: stale weights would be an order of magnitude away by the last step.
        assert line["sampling/sampling_logp_difference/mean"] < 0.02
    assert len(lines) == 4
