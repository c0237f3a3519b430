"""The examples of TRL's documentation run with their import changed and nothing else; offline, with TRL's losses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.examples.documented import OFFLINE, ONLINE, QUICK_STARTS, write_workshop
from tests.examples.script_runs import run_all, run_online
from tests.jobs.start import ROOT, run
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

# README: KTO takes rows in a random order, where TRL takes them as they come; z is of the neighbours in a step, and a
# step has 8 of the 12 answers of pairs. The other datasets fit into one step or come in TRL's own random order.
IN_ANOTHER_ORDER = {"kto unpaired", "kto chat-unpaired", "kto chat-pairs", "kto tokenizer"}
# bf16 rounds to 8 bits, and TRL's AdamW has no fp32 master weights.
IN_BF16 = {name for name in OFFLINE if name.endswith("half")}
# A random model answers no question right, so that accuracy_reward is 0 for all and no advantage is left.
NOTHING_TO_LEARN = set(QUICK_STARTS)
DEFAULT_DIRECTORIES = {"sft texts": "chat-SFT", "dpo pairs": "chat-DPO", "kto unpaired": "chat-KTO",
                       "reward pairs": "judge-Reward"}  # fmt: skip


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The offline scripts with their import changed, on one rank."""
    workshop = tmp_path_factory.mktemp("moved")
    write_workshop(workshop)
    return run_ranks(1, run_all, workshop, list(OFFLINE), timeout=500)[0]


@pytest.fixture(scope="module")
def trls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same as they stand, in TRL."""
    workshop = tmp_path_factory.mktemp("trl")
    write_workshop(workshop)
    results = workshop / "results.json"
    words = [sys.executable, "-m", "tests.examples.script_runs", workshop, results, *OFFLINE]
    run([str(word) for word in words], cwd=ROOT, timeout=500).succeeded()
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The online scripts with their import changed, on one rank with vLLM in it."""
    workshop = tmp_path_factory.mktemp("sampled")
    write_workshop(workshop)
    return run_ranks(1, run_online, workshop, list(QUICK_STARTS), list(ONLINE), timeout=500, fresh=True)[0]


def ran(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The script's result, after what must be true of every script's."""
    result = found[name]
    assert isinstance(result, dict), result
    assert result["trainer"] == f"megalign.trainers.{name.split()[0]}"
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"} <= result["files"]
    assert result["finite"] and result["changed"] is (name not in NOTHING_TO_LEARN)
    assert math.isfinite(result["history"][-1]["train_loss"])
    return result


@pytest.mark.parametrize("name", OFFLINE)
def test_a_script_takes_the_steps_that_it_takes_in_trl_and_its_losses_are_trls(
    name: str, moved: dict[str, Any], trls: dict[str, Any]
) -> None:
    result = ran(moved, name)
    assert result["steps"] == trls[name]["steps"] >= 3
    if name not in IN_ANOTHER_ORDER:
        # What a run of three small steps takes off a DPO loss is a hundred times the bound.
        near = {"abs": 2e-3} if name in IN_BF16 else {"rel": 2e-6}
        assert result["history"][-1]["train_loss"] == pytest.approx(trls[name]["loss"], **near)


@pytest.mark.parametrize("name", DEFAULT_DIRECTORIES)
def test_without_arguments_the_model_is_left_where_trl_leaves_it(name: str, moved: dict[str, Any]) -> None:
    assert Path(ran(moved, name)["output"]).name == DEFAULT_DIRECTORIES[name]


@pytest.mark.vllm
@pytest.mark.parametrize(("name", "steps"), [("grpo quick start", 12), ("rloo quick start", 3)])
def test_a_quick_start_samples_and_one_may_follow_another(name: str, steps: int, sampled: dict[str, Any]) -> None:
    # 4 prompts, 3 epochs; rounds of 8 completions are one prompt of GRPO's and four of RLOO's.
    assert ran(sampled, name)["steps"] == steps


@pytest.mark.vllm
@pytest.mark.parametrize("name", ONLINE)
def test_a_script_that_samples_learns_from_its_rewards(name: str, sampled: dict[str, Any]) -> None:
    assert ran(sampled, name)["steps"] == 2
    assert sampled["started"] == 1


@pytest.mark.vllm
def test_what_reward_functions_log_is_logged(sampled: dict[str, Any]) -> None:
    logged = ran(sampled, "grpo logged")
    assert all(0 <= line["accuracy"] <= 32 for line in logged["history"][:2])
    for step in (1, 2):
        table = pq.read_table(Path(logged["output"]) / f"completions/completions_{step:05d}.parquet").to_pydict()
        assert len(set(table["golden_answer"])) == 1 and table["golden_answer"][0].endswith(".")
    judged = ran(sampled, "grpo judge")["history"]
    assert all({"rewards/judge/mean", "rewards/reward_func/mean"} <= line.keys() for line in judged[:2])
