"""RLOO's advantages and loss against TRL 1.16 on the same tensors, plain autograd and hand arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megalign.algos.rloo import kl_metrics, rloo_advantages, rloo_loss, rloo_reward_metrics, sequence_kl
from megalign.batch import Batch, Counts, Metric
from tests.algos.completions import (
    LENGTHS,
    NAN,
    PROMPT,
    counts_of,
    outputs_of,
    packed,
    recorded,
    trl_inputs,
    value_of,
    with_graph,
)
from tests.algos.trl_rloo_reference import trl_rloo_generation, trl_rloo_loss

COLUMNS = ("old_logprobs", "ref_logprobs")


def some_rewards() -> Tensor:
    """Three groups of two completions, two functions; one that nobody scores beside one that is."""
    return torch.tensor([[1.0, 0.5], [-2.0, NAN], [3.0, 0.0], [NAN, NAN], [NAN, 0.25], [0.5, 4.0]])


def whole() -> dict[str, Tensor]:
    """Recorded completions, all of whose tokens count: TRL's RLOO knows no tools."""
    data = recorded()
    data["loss_mask"] = torch.arange(data["loss_mask"].shape[1]) < torch.tensor(LENGTHS)[:, None]
    return data


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.5)])
@pytest.mark.parametrize(("beta", "num_generations"), [(0.0, 2), (0.3, 2), (0.3, 3), (0.3, 6), (0.3, 1)])
def test_advantages_and_metrics_are_trls(
    beta: float, num_generations: int, clip: tuple[float, float] | None, normalize: bool
) -> None:
    data, rewards, weights = whole(), some_rewards(), torch.tensor([1.0, 0.3])
    how: dict[str, Any] = {"num_generations": num_generations, "beta": beta, "reward_clip_range": clip}
    output, expected = trl_rloo_generation(
        rewards,
        weights,
        prompts=[[1] * PROMPT for _ in LENGTHS],
        completions=[[1] * length for length in LENGTHS],
        old_logprobs=data["old_logprobs"],
        ref_logprobs=data["ref_logprobs"],
        normalize_advantages=normalize,
        **how,
    )
    batch = packed(data, COLUMNS)
    kl = sequence_kl(batch) if beta else None
    ours = rloo_advantages(rewards, weights, kl, normalize_advantages=normalize, **how)
    assert ours.isfinite().all() and (ours.abs().max() > 0.1) == (num_generations > 1)
    torch.testing.assert_close(ours, output["advantages"], rtol=1e-5, atol=1e-5, check_dtype=False)
    metrics = rloo_reward_metrics(rewards, weights, ["reward_0", "reward_1"], kl, **how)
    if beta:
        metrics["kl"] = value_of(kl_metrics(batch, counts_of(data))["kl"])
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_a_group_by_hand() -> None:
    rewards = torch.tensor([[1.0], [2.0], [6.0], [NAN]])
    how: dict[str, Any] = {"num_generations": 4, "normalize_advantages": False}
    ours = rloo_advantages(rewards, torch.ones(1), None, beta=0.0, reward_clip_range=None, **how)
    assert ours.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0]
    # clipped to 1, 2, 3; less KLs of 10, -10, 0, 5 times 0.1: 0, 3, 3
    kl = torch.tensor([10.0, -10.0, 0.0, 5.0])
    ours = rloo_advantages(rewards, torch.ones(1), kl, beta=0.1, reward_clip_range=(0.0, 3.0), **how)
    torch.testing.assert_close(ours, torch.tensor([0 - 3, 3 - 1.5, 3 - 1.5, 0]))


def test_rewards_that_clipping_makes_equal_are_counted_as_such() -> None:
    rewards = torch.tensor([[5.0], [7.0], [0.0], [9.0]])
    how: dict[str, Any] = {"num_generations": 2, "beta": 0.1}
    names = ["f"]
    for clip, kl, share in (((0.0, 1.0), [0.0] * 4, 0.5), ((0.0, 1.0), [1.0, 2.0, 0, 0], 0.0), (None, [0.0] * 4, 0.0)):
        kl = torch.tensor(kl)
        metrics = rloo_reward_metrics(rewards, torch.ones(1), names, kl, reward_clip_range=clip, **how)
        assert metrics["frac_reward_zero_std"] == share and metrics["reward"] == 5.25


def test_bad_groups_learn_nothing() -> None:
    rewards = torch.tensor([[0.25], [0.25], [NAN], [NAN], [7.0], [NAN]])
    for normalize in (False, True):
        ours = rloo_advantages(
            rewards,
            torch.ones(1),
            None,
            num_generations=2,
            beta=0.0,
            reward_clip_range=None,
            normalize_advantages=normalize,
        )
        assert ours.tolist() == [0.0] * 6


@pytest.mark.parametrize(("epsilon", "epsilon_high"), [(0.1, None), (0.1, 0.4), (0.5, 1.0)])
def test_loss_gradient_and_metrics_are_trls(epsilon: float, epsilon_high: float | None) -> None:
    data, leaf = with_graph(recorded())
    mask = data["loss_mask"]
    inputs = trl_inputs(data, None) | {"old_logps": (data["old_logprobs"] * mask).sum(1)}
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    expected, expected_metrics = trl_rloo_loss(inputs, data["logprobs"], data["entropy"], **clips)
    gradient = torch.autograd.grad(expected, leaf, retain_graph=True)[0]
    loss, metrics = rloo_loss(outputs_of(data), packed(data, COLUMNS), counts_of(data), **clips)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], gradient, rtol=1e-6, atol=1e-9)
    assert set(metrics) == set(expected_metrics)
    for name, value in expected_metrics.items():
        assert value_of(metrics[name]) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("parts", [[[5, 3, 1, 0, 2, 4]], [[0], [1, 2], [3], [4, 5]], [[3], [5, 4, 2], [], [1, 0]]])
def test_which_sequences_share_a_microbatch_changes_nothing(parts: list[list[int]]) -> None:
    data, leaf = with_graph(recorded())

    def step(rows: Sequence[int]) -> tuple[Tensor, dict[str, Metric]]:
        clips = {"epsilon": 0.1, "epsilon_high": 0.2}
        if not rows:
            silent = {"logprobs": torch.full((4,), -90.0, requires_grad=True), "entropy": torch.ones(4)}
            return rloo_loss(silent, Batch.dummy(4), counts_of(data), **clips)
        return rloo_loss(outputs_of(data, rows), packed(data, COLUMNS, rows), counts_of(data), **clips)

    whole_loss, whole_metrics = step(range(len(LENGTHS)))
    steps = [step(rows) for rows in parts]
    total = sum(loss.double() for loss, _ in steps)
    torch.testing.assert_close(total, whole_loss)
    gradient = torch.autograd.grad(whole_loss, leaf, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total, leaf)[0], gradient)
    combine = {"sum": sum, "min": min, "max": max}
    for name, metric in whole_metrics.items():
        shares = [value_of(metrics[name]) for _, metrics in steps]
        assert combine[metric.reduce](shares) == pytest.approx(value_of(metric), rel=1e-6), name


def test_a_batch_without_sequences_gives_an_exact_zero_with_a_graph() -> None:
    outputs = {"logprobs": torch.full((4,), -90.0, requires_grad=True), "entropy": torch.ones(4)}
    loss, _ = rloo_loss(outputs, Batch.dummy(4), Counts(tokens=0, sequences=0), epsilon=0.2, epsilon_high=None)
    loss.backward()
    assert loss.item() == 0 and outputs["logprobs"].grad.abs().sum() == 0
    assert sequence_kl(Batch.dummy(4)).shape == (0,)
    assert value_of(kl_metrics(Batch.dummy(4), Counts(tokens=5, sequences=2))["kl"]) == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_ratio_past_the_range_of_floats_stays_finite(advantage: float) -> None:
    batch = Batch(
        tokens=torch.ones(301, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 301], dtype=torch.int32),
        num_sequences=1,
        token_columns={"loss_mask": torch.arange(301) > 0, "old_logprobs": torch.full((301,), -2.0)},
        sequence_columns={"advantages": torch.tensor([advantage])},
    )
    outputs = {"logprobs": torch.full((301,), -1.0, requires_grad=True), "entropy": torch.ones(301)}
    loss, _ = rloo_loss(outputs, batch, Counts(tokens=300, sequences=1), epsilon=0.2, epsilon_high=None)
    loss.backward()
    assert loss.isfinite() and outputs["logprobs"].grad.isfinite().all()
