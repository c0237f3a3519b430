"""GRPOTrainer's loop on tiny models; completions come from seeds, so every layout learns from the same ones."""

from __future__ import annotations

import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megalign.config import GRPOConfig
from megalign.errors import UserError
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model
from tests.trainers.grpo_runs import (
    RandomRollout,
    closeness,
    grpo_fields,
    prompt_rows,
    save_model_with_tokenizer,
    train_grpo,
    train_grpo_with_vllm,
    watch,
)
from tests.trainers.runs import StopAt, metric_lines, without_times

ROWS = prompt_rows(8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


def test_the_loop_syncs_samples_and_learns_in_this_order(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 2, "beta": 0.1}
    (result,) = run_ranks(1, train_grpo, model, ROWS, fields)
    calls = [call for call in result["log"] if "wake" not in call and "sleep" not in call]
    one_round = ["sync", "generate", "reference forward", "policy train_step"]  # its own logprobs are the old ones
    assert calls == one_round * 2
    assert result["versions"] == [0, 1]
    assert result["weights"][0] != result["weights"][1]  # the second sync carries the updated policy


def test_a_round_is_used_for_every_step_and_iteration(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "num_train_epochs": 1.0, "num_iterations": 2, "steps_per_generation": 2}
    (result,) = run_ranks(1, train_grpo, model, ROWS, fields)
    calls = [call for call in result["log"] if "wake" not in call and "sleep" not in call]
    # 16 completions a round are 4 prompts: 2 rounds an epoch, each of 2 steps x 2 iterations.
    assert calls == (["sync", "generate", "policy forward"] + ["policy train_step"] * 4) * 2
    assert result["output"].global_step == 8
    assert result["versions"] == [0, 4]


def test_each_engine_is_awake_only_for_its_own_pass(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 1, "vllm_enable_sleep_mode": True}
    (result,) = run_ranks(1, train_grpo, model, ROWS, fields)
    assert result["log"] == [
        "policy wake",
        "rollout wakes weights",
        "sync",
        "policy sleep",
        "rollout wakes",
        "generate",
        "rollout sleeps",
        "policy wake",
        "policy train_step",
        "policy wake",  # stays awake to be exported
    ]


NAMES = [
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "step_time",
    "entropy",
    "kl",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
    "rewards/closeness/mean",
    "rewards/closeness/std",
    "rewards/brevity/mean",
    "rewards/brevity/std",
    "mean_words",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
    "perf/generation_s",
    "perf/weight_sync_s",
    "perf/reward_s",
    "perf/data_s",
    "perf/reference_s",
    "perf/update_s",
    "perf/other_s",
    "perf/between_steps_s",
    "perf/tflops",
    "perf/tokens_per_s",
    "perf/weight_sync_gb_per_s",
    "perf/weight_sync_peak_gb",
    "step",
]


def test_metrics_have_trls_names_and_the_tables_numbers(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 2, "beta": 0.1, "log_completions": True}
    fields |= {"reward_weights": [1.0, 2.0], "num_completions_to_print": 1}
    (result,) = run_ranks(1, train_grpo, model, ROWS, fields)
    lines = metric_lines(tmp_path)
    assert sorted(lines[0]) == sorted(NAMES)
    for line in lines:
        table = pq.read_table(tmp_path / "completions" / f"completions_{line['step']:05d}.parquet").to_pydict()
        columns = ["step", "prompt", "completion", "closeness", "brevity", "words", "advantage"]
        assert list(table) == columns
        assert len(table["prompt"]) == 8 and table["prompt"][0] == table["prompt"][3] != table["prompt"][4]
        assert line["rewards/closeness/mean"] == pytest.approx(statistics.fmean(table["closeness"]), rel=1e-5)
        scored = [value for value in table["brevity"] if value == value]
        assert 0 < len(scored) < 8
        assert line["rewards/brevity/mean"] == pytest.approx(statistics.fmean(scored), rel=1e-5)
        totals = [
            near + (2 * brief if brief == brief else 0.0)
            for near, brief in zip(table["closeness"], table["brevity"], strict=True)
        ]
        assert line["reward"] == pytest.approx(statistics.fmean(totals), rel=1e-5)
        group = totals[:4]
        expected = [(total - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4) for total in group]
        assert table["advantage"][:4] == pytest.approx(expected, rel=1e-3)
        assert line["mean_words"] == statistics.fmean(table["words"])


def test_every_layout_learns_the_same(model: str, tmp_path: Path) -> None:
    common = {"max_steps": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.1}
    common |= {"mask_truncated_completions": True, "temperature": 0.7}
    layouts = {
        1: {"per_device_train_batch_size": 8},
        2: {"per_device_train_batch_size": 4},
        4: {"per_device_train_batch_size": 4, "tensor_model_parallel_size": 2},
    }
    seen = {}
    for world, layout in layouts.items():
        fields = {"output_dir": str(tmp_path / str(world)), **common, **layout}
        run_ranks(world, train_grpo, model, ROWS, fields)
        seen[world] = [without_times(line) for line in metric_lines(tmp_path / str(world))]
    assert len(seen[1]) == 4
    for world in (2, 4):
        for line, expected in zip(seen[world], seen[1], strict=True):
            assert line == pytest.approx(expected, abs=2e-4, rel=1e-3)


@pytest.mark.parametrize("budget", [None, 30])
@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}, {"data_parallel": 2}], ids=str)
@pytest.mark.parametrize(("at", "versions"), [(3, [4]), (5, [])])
def test_a_run_resumed_in_the_middle_of_a_round_is_bitwise_the_uninterrupted_one(
    layout: dict[str, int], budget: int | None, at: int, versions: list[int], model: str, tmp_path: Path
) -> None:
    layout = dict(layout)
    world = max([1, layout.pop("data_parallel", 1), *layout.values()])
    common = {"max_steps": 8, "steps_per_generation": 2, "num_iterations": 2, "save_strategy": "steps", **layout}
    common |= {"save_steps": at, "logging_steps": 2, "log_completions": True, "max_tokens_per_microbatch": budget}
    whole = {"output_dir": str(tmp_path / "whole"), **common}
    parts = {"output_dir": str(tmp_path / "parts"), **common}
    expected = run_ranks(world, train_grpo, model, ROWS, whole)[0]
    run_ranks(world, train_grpo, model, ROWS, parts, {"stop": StopAt(at)})
    second = run_ranks(world, train_grpo, model, ROWS, parts, {"resume": "latest"})[0]
    assert second["digest"] == expected["digest"]
    assert second["versions"] == versions  # a round's last steps need no new completions
    tables = [
        {path.name: repr(pq.read_table(path).to_pydict()) for path in (tmp_path / name).glob("completions/*.parquet")}
        for name in ("parts", "whole")
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 2
    lines = [without_times(line) for line in metric_lines(tmp_path / "parts")]
    assert lines == [without_times(line) for line in metric_lines(tmp_path / "whole")]


def _resume_error(path: str, fields: dict[str, Any], checkpoint: str) -> str:
    try:
        train_grpo(path, ROWS, fields, {"resume": checkpoint})
    except UserError as error:
        return str(error)
    return "no error"


def test_a_round_may_be_split_otherwise_and_the_model_behind_beta_may_not_change(model: str, tmp_path: Path) -> None:
    fields = {"max_steps": 1, "beta": 0.5, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
    run_ranks(1, train_grpo, model, ROWS, {**fields, "output_dir": str(tmp_path / "out")})
    checkpoint = str(tmp_path / "out/checkpoint-1")  # in the middle of its round
    other = shutil.copytree(model, tmp_path / Path(model).name)
    shutil.copy(Path(save_tiny_model("llama", tmp_path / "seed", seed=1, head_dim=32)) / "model.safetensors", other)
    longer = {**fields, "max_steps": 2, "output_dir": str(tmp_path / "on"), "steps_per_generation": 4}
    longer |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    (error,) = run_ranks(1, _resume_error, str(other), longer, checkpoint)
    assert re.search(r"model \(the reference behind beta\) is .* but .*checkpoint-1 was made with", error), error
    assert run_ranks(1, _resume_error, model, longer, checkpoint) == ["no error"]
    assert [line["step"] for line in metric_lines(tmp_path / "on")] == [2]


def test_evaluation_scores_every_prompt_once_and_disturbs_nothing(model: str, tmp_path: Path) -> None:
    plain = {"output_dir": str(tmp_path / "plain"), "max_steps": 4, "steps_per_generation": 2}
    fields = plain | {"output_dir": str(tmp_path / "eval"), "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"num_generations_eval": 2, "eval_on_start": True, "vllm_enable_sleep_mode": True}
    given = {"eval_dataset": prompt_rows(5)}
    (expected,) = run_ranks(1, train_grpo, model, ROWS, plain)
    (result,) = run_ranks(1, train_grpo, model, ROWS, fields, given)
    assert result["digest"] == expected["digest"]
    lines = metric_lines(tmp_path / "eval")
    evaluations = [line for line in lines if "eval_reward" in line]
    assert [line["step"] for line in evaluations] == [0, 1, 2, 3, 4]
    names = {"eval_loss", "eval_reward", "eval_reward_std", "eval_rewards/closeness/mean", "eval_entropy"}
    assert names | {"eval_completions/mean_length", "eval_num_tokens"} <= evaluations[0].keys()
    assert all(name == "step" or name.startswith("eval_") for name in evaluations[0])
    # The same seeds each time: what changes between evaluations is the policy alone, which this sampler ignores.
    assert len({line["eval_reward"] for line in evaluations}) == 1
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_a_single_function_and_a_built_in_name_are_reward_functions(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 1}
    (result,) = run_ranks(1, train_grpo, model, ROWS, fields, {"reward_funcs": "length_reward"})
    line = metric_lines(tmp_path)[0]
    assert line["reward"] == line["rewards/length_reward/mean"] == -line["completions/mean_length"]


def _stopped_and_started_again(path: str, fields: dict[str, Any]) -> list[str]:
    from megalign.trainers import online
    from megalign.trainers.grpo import GRPOTrainer

    online.VllmEngine, real = RandomRollout, online.VllmEngine
    try:
        args = GRPOConfig(**grpo_fields(**fields))
        trainer = GRPOTrainer(path, closeness, args, train_dataset=ROWS, callbacks=[StopAt(1)])
        log = watch(trainer)
        trainer.train()
        trainer.train()
    finally:
        online.VllmEngine = real
    return log


def test_a_second_train_samples_anew(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 4, "steps_per_generation": 2}
    (log,) = run_ranks(1, _stopped_and_started_again, model, fields)
    calls = [call for call in log if "wake" not in call and "sleep" not in call]
    assert calls == ["sync", "generate", "policy forward", "policy train_step"] * 2


def test_an_evaluation_between_two_logs_leaves_the_table_alone(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 2, "log_completions": True}
    fields |= {"eval_strategy": "steps", "eval_steps": 1, "log_unique_prompts": True}
    run_ranks(1, train_grpo, model, ROWS, fields, {"eval_dataset": prompt_rows(3)})
    table = pq.read_table(tmp_path / "completions" / "completions_00002.parquet").to_pydict()
    assert len(table["prompt"]) == len(set(table["prompt"])) == 2  # 8 completions in groups of 4


@pytest.mark.vllm
@pytest.mark.slow
def test_with_vllm_a_run_learns_from_its_own_policy_and_resumes_bitwise(model: str, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "pipeline_model_parallel_size": 2, "save_strategy": "steps", "save_steps": 2}
    fields |= {"vllm_enable_sleep_mode": True, "eval_strategy": "steps", "eval_steps": 4}
    fields |= {"num_generations_eval": 2, "steps_per_generation": 2, "max_completion_length": 8}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected, _ = run_ranks(
        2, train_grpo_with_vllm, model, ROWS, {"output_dir": str(whole), **fields}, timeout=240, fresh=True
    )
    lines = metric_lines(whole)
    steps = [line for line in lines if "loss" in line]
    differences = [line["sampling/sampling_logp_difference/mean"] for line in steps[::2]]
    # The learning rate moves the policy far each step: only synced weights explain such agreement.
    assert all(difference < 1e-3 for difference in differences)
    assert 0 < steps[0]["completions/mean_length"] <= 8
    assert [line["step"] for line in lines if "eval_reward" in line] == [4]

    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    result, _ = run_ranks(
        2,
        train_grpo_with_vllm,
        model,
        ROWS,
        {"output_dir": str(parts), **fields},
        "latest",
        timeout=240,
        fresh=True,
    )
    assert result["digest"] == expected["digest"]
    resumed = [without_times(line) for line in metric_lines(parts)]
    assert resumed == [without_times(line) for line in lines if line["step"] > 2]


def _error_of(path: str, fields: dict[str, Any], given: dict[str, Any], rows: Any = ROWS) -> str:
    try:
        train_grpo(path, rows, fields, given)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"per_device_train_batch_size": 64}, {}, "train_dataset has 8 prompts but a round of sampling takes 16"),
        ({"reward_weights": [1.0]}, {}, "reward_weights has 1 values for 2 reward functions"),
        ({}, {"reward_funcs": []}, "no reward function"),
        ({"num_generations": 3}, {}, "must be a multiple of num_generations 3"),
    ],
)
def test_mistakes_are_named_in_one_line(
    model: str, tmp_path: Path, fields: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    (error,) = run_ranks(1, _error_of, model, {"output_dir": str(tmp_path), **fields}, given)
    assert re.search(message, error), error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({}, {"reward_funcs": ["no_reward"]}, "no_reward"),
        ({"reward_weights": [1.0]}, {}, "reward_weights has 1 values for 2 reward functions"),
        ({"eval_on_start": True}, {}, "eval_on_start=True needs an eval_dataset"),
    ],
)
def test_mistakes_are_named_before_rows_are_read(
    model: str, tmp_path: Path, fields: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    fields = {"output_dir": str(tmp_path), **fields}
    (error,) = run_ranks(1, _error_of, model, fields, given, "no rows at all")
    assert re.search(message, error), error


def test_a_model_without_a_tokenizer_is_named_before_rows_are_read(tmp_path: Path) -> None:
    path = save_tiny_model("llama", tmp_path / "model", head_dim=32)
    (error,) = run_ranks(1, _error_of, path, {"output_dir": str(tmp_path)}, {}, "no rows at all")
    assert re.search("model directory .* has no tokenizer", error), error


def _without_vllm(path: str, fields: dict[str, Any]) -> str:
    from megalign.trainers import online

    online.find_spec, real = (lambda name: None), online.find_spec
    try:
        return _error_of(path, fields, {}, "no rows at all")
    finally:
        online.find_spec = real


def test_missing_vllm_is_named_before_rows_are_read(model: str, tmp_path: Path) -> None:
    (error,) = run_ranks(1, _without_vllm, model, {"output_dir": str(tmp_path)})
    assert "vLLM is not installed" in error
