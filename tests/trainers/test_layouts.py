"""What each of the eight trainers logs, and every gradient tensor, is the same at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import LAYOUTS, ONE_RANK, Layout
from tests.ranks import run_ranks
from tests.trainers.layout_runs import OFFLINE, ONLINE, run, save_models
from tests.trainers.runs import without_times

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in (*OFFLINE, *ONLINE)},
    "Reward-centred": ("Reward", {"center_rewards_coefficient": 0.1}),
    "DPO-coupled": (
        "DPO",
        {"loss_type": ["aot", "aot_unpaired", "sigmoid"], "loss_weights": [0.5, 1.0, 2.0], "ld_alpha": 0.5},
    ),
    "DPO-weighted": ("DPO", {"loss_type": ["ipo", "sft"], "use_weighting": True, "sync_ref_model": True,
                             "ref_model_sync_steps": 1}),
    "DPO-precomputed": ("DPO", {"precompute_ref_log_probs": True}),
    "KTO-precomputed": ("KTO", {"precompute_ref_log_probs": True}),
    "GRPO-entropy": (
        "GRPO",
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "beta": 0.1, "sync_ref_model": True,
         "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3},
    ),
    "RLOO-normalized": ("RLOO", {"normalize_advantages": True, "reward_clip_range": [-1.0, 0.5]}),
    "PPO-whitened": ("PPO", {"whiten_rewards": True, "kl_estimator": "k3", "missing_eos_penalty": 0.5,
                             "num_ppo_epochs": 1, "num_mini_batches": 2, "per_device_train_batch_size": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Of a family: a policy, a reference that differs from it everywhere, a reward model with its tokenizer."""
    return {family: save_models(family, tmp_path_factory.mktemp(family)) for family in ("llama", "qwen3_moe")}


def scaled(options: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The same global batch when a variant names its own microbatch."""
    size = options.get("per_device_train_batch_size")
    return options if size is None else {**options, "per_device_train_batch_size": size // layout.dp}


_ONE_RANK: dict[tuple[str, str], Any] = {}  # by family and variant


def on_one_rank(family: str, name: str, paths: dict[str, str], directory: Path) -> dict[str, Any]:
    if (family, name) not in _ONE_RANK:
        kind, options = VARIANTS[name]
        (_ONE_RANK[family, name],) = run_ranks(1, run, kind, paths, ONE_RANK, str(directory / "one"), options)
    return _ONE_RANK[family, name]


def case(layout: Layout, name: str) -> Any:
    """On the newest Megatron-Core too for the plain trainers at three layouts: what differs is Megatron's."""
    newest = name == VARIANTS[name][0] and layout in (Layout(tp=2, sp=True), Layout(cp=2), Layout(pp=2, vpp=2))
    return pytest.param(layout, name, marks=[pytest.mark.megatron] if newest else [])


@pytest.mark.parametrize(("layout", "name"), [case(layout, name) for layout in LAYOUTS for name in VARIANTS], ids=str)
def test_logs_and_gradients_are_those_of_one_rank(
    layout: Layout, name: str, paths: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    check_layout("llama", name, layout, paths["llama"], tmp_path)


@pytest.mark.megatron
@pytest.mark.parametrize("name", ["SFT", "Reward", "DPO", "GRPO", "PPO"])
@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(tp=2, sp=True, ep=2, etp=1)], ids=str)
def test_logs_and_gradients_of_a_model_with_experts_are_those_of_one_rank(
    name: str, layout: Layout, paths: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    check_layout("qwen3_moe", name, layout, paths["qwen3_moe"], tmp_path)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "PPO"])
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(dp=2), Layout(dp=2, pp=2, vpp=2)], ids=str)
def test_microbatches_by_a_budget_of_tokens_change_no_number(
    name: str, layout: Layout, paths: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    ranks = check_layout("llama", name, layout, paths["llama"], tmp_path, max_tokens_per_microbatch=40)
    assert all(0 <= found["lines"][0]["perf/imbalance"] < 1 for found in ranks)  # PPO deals out both steps at once


def check_layout(
    family: str, name: str, layout: Layout, paths: dict[str, str], directory: Path, **changes: Any
) -> list[dict[str, Any]]:
    kind, options = VARIANTS[name]
    wanted = on_one_rank(family, name, paths, directory)
    options = {**scaled(options, layout), **changes}
    ranks = run_ranks(layout.world, run, kind, paths, layout, str(directory / "many"), options)
    for found in ranks:
        assert len(found["lines"]) == len(wanted["lines"]) == 2
        for line, other in zip(found["lines"], wanted["lines"], strict=True):
            check_line(line, other)
            check_times(line, name, layout)
        for engine, gradients in wanted["gradients"].items():
            assert sorted(found["gradients"][engine]) == sorted(gradients)
            for key, gradient in gradients.items():
                difference = float((found["gradients"][engine][key] - gradient).norm())
                assert difference <= 1e-4 * float(gradient.norm()), (engine, key, difference)
    return ranks


@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(tp=2, sp=True, etp=1)], ids=str)
def test_a_dense_reward_model_stands_beside_a_policy_with_experts(
    layout: Layout, paths: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    mixed = {**paths["qwen3_moe"], "reward": paths["llama"]["reward"]}
    kind, options = VARIANTS["PPO"]
    (one,) = run_ranks(1, run, kind, mixed, ONE_RANK, str(tmp_path / "one"), options)
    for found in run_ranks(layout.world, run, kind, mixed, layout, str(tmp_path / "many"), scaled(options, layout)):
        for line, other in zip(found["lines"], one["lines"], strict=True):
            check_line(line, other)


def check_times(line: dict[str, Any], name: str, layout: Layout) -> None:
    """A step's phases add up to it, and passes of the policy or the critic before the update have their own."""
    beside = ("perf/pipeline_wait_s", "perf/between_steps_s", "perf/tokens_per_s", "perf/weight_sync_gb_per_s")
    phases = [key for key in line if key.startswith("perf/") and key.endswith("_s") and key not in beside]
    assert sum(line[key] for key in phases) == pytest.approx(line["step_time"], rel=1e-6)
    assert (beside[0] in line) == (layout.pp > 1)
    assert 0 <= line.get(beside[0], 0.0) <= line["perf/update_s"]
    kind, _ = VARIANTS[name]
    assert ("perf/critic_s" in line) == (kind == "PPO")
    asks_the_whole_step = name in ("KTO", "KTO-precomputed", "DPO-coupled", "GRPO-entropy")
    if asks_the_whole_step or kind in OFFLINE:  # those that sample may also need old logprobs
        assert ("perf/logprob_s" in line) == asks_the_whole_step


def check_line(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Each number to 1e-4 relative; those that are differences of larger ones, to 1e-4 of the largest in the line."""
    found, wanted = without_times(found), without_times(wanted)
    assert sorted(found) == sorted(wanted)
    for key, value in wanted.items():
        if value is None:
            continue
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
