"""GRPO advantages and reward metrics against TRL 1.16 and hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megalign.algos.advantages import group_advantages, nanstd, reward_metrics
from tests.algos.trl_reference import trl_scored_generation

NAN = float("nan")


def some_rewards() -> tuple[Tensor, Tensor]:
    """Six groups of four, two functions; a None here and there, a row and a group that nobody scores, a
    constant group.
    """
    rewards = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    rewards[1, 0] = NAN
    rewards[6, 1] = NAN
    rewards[9] = NAN
    rewards[12:16] = NAN
    rewards[16:20] = 0.25
    rewards[20:23] = NAN  # one scored completion: its group has no standard deviation
    return rewards, torch.tensor([1.0, 0.3])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_and_metrics_are_trls(scale: str) -> None:
    rewards, weights = some_rewards()
    ids = [[5, 6]] * len(rewards)
    output, expected = trl_scored_generation(
        rewards, weights, num_generations=4, scale_rewards=scale, prompts=ids, completions=ids
    )
    ours = group_advantages(rewards, weights, num_generations=4, scale_rewards=scale)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, output["advantages"], rtol=1e-6, atol=1e-6)
    metrics = reward_metrics(rewards, weights, ["reward_0", "reward_1"], num_generations=4, scale_rewards=scale)
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("num_generations", [4, 1])
def test_gdpo_is_trls(num_generations: int) -> None:
    rewards, weights = some_rewards()
    ids = [[5, 6]] * len(rewards)
    how = {
        "num_generations": num_generations,
        "scale_rewards": "group",
        "multi_objective_aggregation": "normalize_then_sum",
    }
    output, expected = trl_scored_generation(rewards, weights, prompts=ids, completions=ids, **how)
    ours = group_advantages(rewards, weights, **how)
    assert (ours.abs().max() > 0.1) == (num_generations > 1)
    torch.testing.assert_close(ours, output["advantages"], rtol=1e-6, atol=1e-6)
    metrics = reward_metrics(rewards, weights, ["reward_0", "reward_1"], **how)
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


def test_gdpo_by_hand() -> None:
    # groups of two: a function's normalized rewards are +-1/2 over the std 1/sqrt(2), whatever its scale
    rewards = torch.tensor([[1.0, 0.0], [0.0, 100.0], [3.0, 7.0], [3.0, 7.0]])
    how = {"num_generations": 2, "scale_rewards": "group", "multi_objective_aggregation": "normalize_then_sum"}
    ours = group_advantages(rewards, torch.tensor([2.0, 1.0]), **how)
    first = 0.5 / (math.sqrt(0.5) + 1e-4)
    second = 50 / (math.sqrt(5000) + 1e-4)
    total = 2 * first - second
    std = math.sqrt(2 * total**2 / 3)
    expected = torch.tensor([total, -total, 0.0, 0.0]) / (std + 1e-4)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    equal = group_advantages(torch.ones(4, 2), torch.ones(2), **how)
    assert equal.tolist() == [0.0] * 4
    assert reward_metrics(torch.ones(4, 2), torch.ones(2), ["f", "g"], **how)["frac_reward_zero_std"] == 1.0


@pytest.mark.parametrize(("alias", "name"), [(True, "group"), (False, "none")])
def test_scale_rewards_takes_trls_booleans(alias: bool, name: str) -> None:
    rewards, weights = some_rewards()
    one = group_advantages(rewards, weights, num_generations=4, scale_rewards=alias)
    other = group_advantages(rewards, weights, num_generations=4, scale_rewards=name)
    assert torch.equal(one, other)
    assert not torch.equal(one, group_advantages(rewards, weights, num_generations=4, scale_rewards="batch"))


def test_a_group_by_hand() -> None:
    rewards = torch.tensor([[1.0], [0.0], [0.0], [3.0]])
    # mean 1, squares 0 1 1 4: Bessel variance 2
    expected = torch.tensor([0.0, -1.0, -1.0, 2.0]) / (math.sqrt(2.0) + 1e-4)
    ours = group_advantages(rewards, torch.ones(1), num_generations=4, scale_rewards="group")
    torch.testing.assert_close(ours, expected)


def test_a_function_that_does_not_apply_is_left_out_of_the_sum_and_an_unscored_row_gets_nothing() -> None:
    rewards = torch.tensor([[1.0, NAN], [1.0, 1.0], [NAN, NAN], [NAN, 4.0]])
    # weighted totals 2, 3, none, 4 with weights 2 and 1: mean 3
    ours = group_advantages(rewards, torch.tensor([2.0, 1.0]), num_generations=4, scale_rewards="none")
    assert ours.tolist() == [-1.0, 0.0, 0.0, 1.0]


def test_equal_rewards_give_zero_advantages_and_are_counted() -> None:
    rewards = torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    assert group_advantages(rewards, torch.ones(1), num_generations=2, scale_rewards="group")[:2].tolist() == [0, 0]
    metrics = reward_metrics(rewards, torch.ones(1), ["f"], num_generations=2, scale_rewards="group")
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["reward"] == 0.75
    assert metrics["rewards/f/std"] == pytest.approx(0.5)


def test_one_completion_a_prompt_gives_zero_advantages() -> None:
    rewards = torch.tensor([[1.0], [2.0]])
    ours = group_advantages(rewards, torch.ones(1), num_generations=1, scale_rewards="group")
    assert ours.tolist() == [0.0, 0.0]


def test_nanstd_is_torchs_std_of_the_numbers() -> None:
    values = torch.tensor([[1.0, NAN, 4.0, 8.0], [NAN, NAN, 2.0, NAN]])
    stds = nanstd(values, dim=1)
    torch.testing.assert_close(stds[0], torch.tensor([1.0, 4.0, 8.0]).std())
    assert stds[1].isnan()
