"""DAPO's dynamic sampling: which groups stay, who takes the place of the others, and where the stream stands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from megalign.batch import Completion
from megalign.data.sampler import EpochSampler
from megalign.rollout.rewards import RewardResult
from megalign.trainers.dynamic_sampling import Refill
from megalign.trainers.sampling import Sampled
from tests.ranks import run_ranks
from tests.trainers.grpo_runs import prompt_rows, save_model_with_tokenizer, train_grpo
from tests.trainers.runs import StopAt, metric_lines

PROMPTS = Dataset.from_list([{"prompt": f"p{row}"} for row in range(6)])


def drawn(groups: list[list[float]], name: str) -> Sampled:
    rewards = torch.tensor([reward for group in groups for reward in group])[:, None]
    completions = [
        Completion(index=i, prompt_ids=[1], completion_ids=[2], logprobs=[-1.0], finish_reason="stop",
                   policy_version=0, row={"prompt": f"{name}{i // 2}"})
        for i in range(len(rewards))
    ]  # fmt: skip
    return Sampled(completions, RewardResult(rewards=rewards, extra={"of": [name] * len(rewards)}, metrics={"m": 1.0}))


def refill(limit: int = 10, weights: tuple[float, ...] = (1.0,), **fields: Any) -> Refill:
    args = SimpleNamespace(num_generations=2, data_order_seed=3, dynamic_sampling_max_rounds=limit, **fields)
    return Refill(args, torch.tensor(weights))


def test_groups_of_equal_rewards_are_replaced_in_order() -> None:
    later = [drawn([[1.0, 1.0], [0.5, 1.0]], "b"), drawn([[0.0, 1.0], [0.0, 0.25]], "c")]
    asked: list[tuple[int, int]] = []

    def draw(prompts: list[dict[str, Any]], part: int) -> Sampled:
        asked.append((len(prompts), part))
        return later.pop(0)

    first = drawn([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], "a")
    filled, metrics = refill().filled(first, draw, PROMPTS, 3)
    assert [completion.row["prompt"] for completion in filled.completions] == ["a0", "a0", "b1", "b1", "c0", "c0"]
    assert [completion.index for completion in filled.completions] == [0, 1, 2, 3, 4, 5]
    assert filled.scored.rewards.flatten().tolist() == [0.0, 1.0, 0.5, 1.0, 0.0, 1.0]
    assert filled.scored.extra["of"] == ["a", "a", "b", "b", "c", "c"]
    assert asked == [(3, 1), (3, 2)]
    assert metrics["dynamic_sampling/rounds"] == 3
    assert metrics["dynamic_sampling/kept"] == pytest.approx(4 / 7)
    assert metrics["dynamic_sampling/unfilled"] == 0
    # all that was sampled: 3 + 3.5 + 1.25 over 14 completions
    assert metrics["dynamic_sampling/reward"] == pytest.approx((1 + 2 + 0 + 2 + 1.5 + 1 + 0.25) / 14)


def test_a_round_that_cannot_be_filled_says_so() -> None:
    filled, metrics = refill(limit=1).filled(drawn([[1.0, 1.0], [0.0, 1.0]], "a"), _never, PROMPTS, 2)
    assert [completion.row["prompt"] for completion in filled.completions] == ["a1", "a1", "a0", "a0"]
    assert metrics["dynamic_sampling/unfilled"] == 1


def test_a_group_with_one_scored_completion_teaches_nothing() -> None:
    _, metrics = refill(limit=1).filled(drawn([[float("nan"), 1.0]], "a"), _never, PROMPTS, 1)
    assert metrics["dynamic_sampling/kept"] == 0


@pytest.mark.parametrize(("aggregation", "kept"), [("sum_then_normalize", 1 / 3), ("normalize_then_sum", 2 / 3)])
def test_a_group_teaches_by_what_its_advantages_are_taken_of(aggregation: str, kept: float) -> None:
    sampled = drawn([[0.0, 0.0]] * 3, "a")
    # Equal sums of unequal rewards; unequal sums; what differs has no weight.
    rewards = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 2.0]]
    sampled = sampled._replace(scored=replace(sampled.scored, rewards=torch.tensor(rewards)))
    filler = refill(limit=1, weights=(1.0, 1.0, 0.0), multi_objective_aggregation=aggregation)
    _, metrics = filler.filled(sampled, _never, PROMPTS, 3)
    assert metrics["dynamic_sampling/kept"] == pytest.approx(kept)


def _never(prompts: list[dict[str, Any]], part: int) -> Sampled:
    raise AssertionError("nothing more is to be drawn")


def test_the_stream_of_further_prompts_goes_on_where_it_stood() -> None:
    def prompts_of(filler: Refill, rounds: int) -> list[str]:
        seen: list[str] = []

        def draw(prompts: list[dict[str, Any]], part: int) -> Sampled:
            seen.extend(prompt["prompt"] for prompt in prompts)
            return drawn([[0.0, 1.0]] * 2, "x")

        for _ in range(rounds):
            filler.filled(drawn([[1.0, 1.0]] * 2, "a"), draw, PROMPTS, 2)
        return seen

    whole = prompts_of(refill(), 4)
    parts = refill()
    first = prompts_of(parts, 1)
    other = refill()
    other.load_state_dict(parts.state_dict())
    assert first + prompts_of(other, 3) == whole
    assert len(set(whole[:6])) == 6  # an epoch has each prompt once
    training = EpochSampler(6, 6, seed=refill()._args.data_order_seed, shuffle=True)
    orders = [[PROMPTS[row]["prompt"] for row in next(training)] for _ in range(3)]
    assert whole[:6] not in orders  # theirs is none of the next epochs'


def sometimes(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Differs in about half of the groups."""
    return [float(ids[0] % 3 == 0) for ids in completion_ids]


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(world: int, tmp_path: Path) -> None:
    model = save_model_with_tokenizer(tmp_path / "model")
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_generations": 2, "dynamic_sampling": True}
    given = {"reward_funcs": [sometimes]}
    rows = prompt_rows(8)
    whole = {"output_dir": str(tmp_path / "whole"), **common, "per_device_train_batch_size": 8 // world}
    parts = {**whole, "output_dir": str(tmp_path / "parts")}
    expected = run_ranks(world, train_grpo, model, rows, whole, given)[0]
    run_ranks(world, train_grpo, model, rows, parts, {**given, "stop": StopAt(2)})
    found = run_ranks(world, train_grpo, model, rows, parts, {**given, "resume": "latest"})[0]
    assert found["digest"] == expected["digest"]
    lines = metric_lines(tmp_path / "whole")
    assert max(line["dynamic_sampling/rounds"] for line in lines) > 1
    assert all(line["frac_reward_zero_std"] == 0 for line in lines)
