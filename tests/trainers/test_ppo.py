"""PPOTrainer's four engines: who is awake when, where the critic comes from and goes to, and what a resume keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megalign.config import PPOConfig
from megalign.errors import UserError
from tests.ranks import run_ranks
from tests.tiny import save_tiny_classifier
from tests.trainers.grpo_runs import closeness, prompt_rows, save_model_with_tokenizer, watch
from tests.trainers.layout_runs import made
from tests.trainers.runs import StopAt, digest, metric_lines, without_times

ROWS = prompt_rows(8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def judge(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("judge")
    save_tiny_classifier("llama", path, seed=4, head_dim=32)
    for file in Path(model).glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return str(path)


def train(model: str, fields: dict[str, Any], given: dict[str, Any] | None = None) -> dict[str, Any]:
    given = dict(given or {})
    resume = given.pop("resume", None)
    fields = {
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "num_ppo_epochs": 2,
        **fields,
    }
    given.setdefault("reward_funcs", [closeness])
    trainer = made("PPO", model, PPOConfig(**fields), {"train_dataset": ROWS, **given})
    before = trainer.critic.kept_as_it_was
    with before():
        start = {name: tensor.clone() for name, tensor in trainer.critic.gathered()}
    log = watch_critic(trainer)
    output = trainer.train(resume_from_checkpoint=resume)
    return {
        "train_loss": output.training_loss,
        "digests": (digest(fields["output_dir"]), digest(f"{fields['output_dir']}/critic")),
        "critic_at_start": start,
        "log": log,
        "coefficient": trainer.kl.coefficient,
    }


def watch_critic(trainer: Any) -> list[str]:
    log = watch(trainer)
    for method in ("forward", "train_step", "sleep", "wake"):
        original = getattr(trainer.critic, method)

        def call(*args: Any, _original: Any = original, _name: str = f"critic {method}", **kwargs: Any) -> Any:
            log.append(_name)
            return _original(*args, **kwargs)

        setattr(trainer.critic, method, call)
    return log


def test_each_engine_is_awake_only_for_its_own_pass(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 2, "vllm_enable_sleep_mode": True}
    (result,) = run_ranks(1, train, model, fields)
    calls = [call for call in result["log"] if "wakes" not in call and "sleeps" not in call]
    assert calls[: calls.index("policy train_step") + 1] == [
        "policy wake", "sync", "policy sleep", "generate",
        "reference forward",
        "policy wake", "policy forward", "policy sleep",
        "critic wake", "critic forward", "critic sleep",
        "critic wake", "critic train_step", "critic train_step", "critic sleep",
        "policy wake", "policy train_step",
    ]  # fmt: skip


def test_the_critic_begins_as_the_reward_model_and_is_saved_beside_the_policy(
    model: str, judge: str, tmp_path: Path
) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 2, "reward_model_path": judge, "save_strategy": "steps"}
    (result,) = run_ranks(1, train, model, fields, {"reward_funcs": None})
    shutil.rmtree(tmp_path / "critic")  # as if the run had been killed between the policy and the critic
    (found,) = run_ranks(1, train, model, fields, {"reward_funcs": None, "resume": "latest"})
    assert found["digests"] == result["digests"]
    begun = AutoModelForSequenceClassification.from_pretrained(judge).state_dict()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in result["critic_at_start"].items())
    saved, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and saved.config.num_labels == 1
    assert not torch.equal(saved.score.weight, begun["score.weight"])
    assert (tmp_path / "critic" / "tokenizer.json").exists()


def test_in_the_warm_up_the_critic_learns_alone(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 3, "critic_warmup_steps": 2, "critic_learning_rate": 0.02,
              "lr_scheduler_type": "constant"}  # fmt: skip
    (result,) = run_ranks(1, train, model, fields)
    assert [call for call in result["log"] if call.endswith("train_step")] == ["critic train_step"] * 4 + [
        "policy train_step"
    ]
    lines = metric_lines(tmp_path)
    assert ["loss/policy_avg" in line for line in lines] == [False, False, True]
    assert [line["learning_rate"] for line in lines] == [0.02, 0.02, 0.01]
    assert [line["critic_learning_rate"] for line in lines] == [0.02] * 3
    assert lines[0]["loss"] == pytest.approx(0.1 * lines[0]["loss/value_avg"])
    assert result["train_loss"] == pytest.approx(sum(line["loss"] for line in lines) / 3)


def test_an_adaptive_coefficient_moves_with_the_measured_kl(model: str, judge: str, tmp_path: Path) -> None:
    adaptive = {"kl_coef": 0.2, "kl_target": 1e-3, "kl_horizon": 40, "max_steps": 4, "num_ppo_epochs": 1}
    (result,) = run_ranks(1, train, model, {"output_dir": str(tmp_path), **adaptive})
    lines = metric_lines(tmp_path)
    expected = 0.2
    for line in lines:
        assert line["kl_coef"] == pytest.approx(expected)
        # arXiv 1909.08593 sec. 2.2, 8 completions a round
        expected *= 1 + max(-0.2, min(0.2, line["objective/kl"] / 1e-3 - 1)) * 8 / 40
    assert result["coefficient"] == pytest.approx(expected)
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["kl_coef"] != lines[0]["kl_coef"]


def test_an_evaluation_does_not_move_the_coefficient(model: str, judge: str, tmp_path: Path) -> None:
    fields = {"kl_coef": 0.2, "kl_target": 1e-3, "kl_horizon": 40, "max_steps": 3, "num_ppo_epochs": 1}
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    (plain,) = run_ranks(1, train, model, {"output_dir": str(tmp_path / "plain"), **fields})
    given = {"eval_dataset": prompt_rows(4)}
    (found,) = run_ranks(1, train, model, {"output_dir": str(tmp_path / "eval"), **fields, **evaluating}, given)
    assert found["coefficient"] == plain["coefficient"] != 0.2


def sources(model: str, fields: dict[str, Any], given: dict[str, Any]) -> list[str]:
    trainer = made("PPO", model, PPOConfig(**fields), {"train_dataset": ROWS, **given})
    return trainer.rewards.names


def test_rewards_of_constructor_and_config_come_together(model: str, judge: str, tmp_path: Path) -> None:
    fields, name = {"output_dir": str(tmp_path)}, Path(judge).name
    for config, given, expected in (
        ({"reward_model_path": judge}, {"reward_funcs": [closeness]}, ["closeness", name]),
        ({"reward_funcs": ["length_reward"]}, {"reward_model": judge}, ["length_reward", name]),
        ({"reward_funcs": ["length_reward"]}, {"reward_funcs": closeness}, ["closeness"]),
    ):
        assert run_ranks(1, sources, model, {**fields, **config}, given) == [expected]


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(world: int, model: str, tmp_path: Path) -> None:
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "kl_target": 0.5, "kl_coef": 0.1}
    common |= {"pipeline_model_parallel_size": world, "logging_steps": 2}  # both end within a round of two steps
    whole, parts = ({"output_dir": str(tmp_path / name), **common} for name in ("whole", "parts"))
    expected = run_ranks(world, train, model, whole)[0]
    run_ranks(world, train, model, parts, {"callbacks": [StopAt(3)]})
    found = run_ranks(world, train, model, parts, {"resume": "latest"})[0]
    assert found["digests"] == expected["digests"]
    assert found["coefficient"] == expected["coefficient"]
    lines, wanted = ([without_times(line) for line in metric_lines(tmp_path / name)] for name in ("parts", "whole"))
    assert lines == wanted


def refused(model: str, fields: dict[str, Any], given: dict[str, Any]) -> str:
    try:
        train(model, fields, given)
    except UserError as error:
        return str(error)
    return ""


def nothing(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None] * len(completions)


def test_a_completion_without_a_score_is_named(model: str, tmp_path: Path) -> None:
    (error,) = run_ranks(1, refused, model, {"output_dir": str(tmp_path), "max_steps": 1}, {"reward_funcs": [nothing]})
    assert "no reward function scored completion 0" in error


def sampled_as(model: str, fields: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    params = made("PPO", model, PPOConfig(**fields), {"train_dataset": ROWS, "reward_funcs": [closeness]}).sampling
    return params._generation.stop_token_ids, dict(params._generation.extra)


@pytest.mark.parametrize(
    ("fields", "stop", "extra"),
    [({}, (2,), {}), ({"stop_token": "eos"}, (2,), {}), ({"stop_token_id": 7}, (7,), {"ignore_eos": True})],
)
def test_a_stop_token_of_the_config_alone_ends_completions(
    model: str, tmp_path: Path, fields: dict[str, Any], stop: tuple[int, ...], extra: dict[str, Any]
) -> None:
    (found,) = run_ranks(1, sampled_as, model, {"output_dir": str(tmp_path), **fields})
    assert found == (stop, extra)


def test_a_directory_that_a_model_is_read_from_is_not_written(model: str, judge: str, tmp_path: Path) -> None:
    given = {"reward_funcs": [closeness]}
    for fields in ({"output_dir": judge, "reward_model_path": judge}, {"output_dir": judge, "value_model_path": judge}):
        (error,) = run_ranks(1, refused, model, fields, given)
        assert f"output_dir={judge!r} is also the directory of" in error
    critic = tmp_path / "critic"
    shutil.copytree(judge, critic)
    fields = {"output_dir": str(tmp_path), "value_model_path": str(critic)}
    assert "the critic, which the trained model would overwrite" in run_ranks(1, refused, model, fields, given)[0]


def test_a_stop_token_past_the_vocabulary_is_refused(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "stop_token_id": 9999}
    (error,) = run_ranks(1, refused, model, fields, {"reward_funcs": [closeness]})
    assert "stop_token_id=9999 is not in the model's vocabulary" in error


def test_episodes_say_how_long_a_run_is(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "total_episodes": 17, "num_ppo_epochs": 1}  # 8 a round: 3 rounds
    run_ranks(1, train, model, fields)
    assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2, 3]
