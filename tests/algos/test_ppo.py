"""PPO's token rewards and losses against hand arithmetic and plain fp64 autograd on a full vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megalign.algos.ppo import (
    objective_metrics,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    with_missing_eos_penalty,
)
from megalign.batch import Batch, Counts, Metric
from tests.algos.completions import LENGTHS, counts_of, outputs_of, packed, recorded, value_of, with_graph

NAN = float("nan")


def pair(**columns: list[float]) -> Batch:
    """Two completions of two tokens and of one (its first token a tool's), behind prompts of one; a tail."""
    return Batch(
        tokens=torch.ones(8, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 6, 8], dtype=torch.int32),
        num_sequences=2,
        token_columns={"loss_mask": torch.tensor([False, True, True, False, False, True, False, False])}
        | {name: torch.tensor(column) for name, column in columns.items()},
    )


def test_token_rewards_by_hand() -> None:
    kl = torch.tensor([9.0, 1.0, -2.0, 9.0, 9.0, 4.0, 9.0, 9.0])
    rewards = token_rewards(kl, torch.tensor([10.0, -1.0]), pair(), kl_coef=0.5)
    assert rewards.tolist() == [0, -0.5, 1 + 10, 0, 0, -2 - 1, 0, 0]


def test_a_completion_without_loss_tokens_needs_no_score_and_another_does() -> None:
    batch = Batch(
        tokens=torch.ones(5, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32),
        num_sequences=2,
        token_columns={"loss_mask": torch.tensor([False, False, False, True, True])},
    )
    rewards = token_rewards(torch.ones(5), torch.tensor([NAN, 3.0]), batch, kl_coef=1.0)
    assert rewards.tolist() == [0, 0, 0, -1, 2]
    with pytest.raises(AssertionError, match="not finite"):
        token_rewards(torch.ones(5), torch.tensor([3.0, NAN]), batch, kl_coef=1.0)
    assert token_rewards(torch.ones(4), torch.zeros(0), Batch.dummy(4), kl_coef=1.0).tolist() == [0.0] * 4


def test_a_missing_end_costs_the_penalty() -> None:
    scores, ended = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([True, False, False])
    assert with_missing_eos_penalty(scores, ended, 1.5).tolist() == [1.0, -3.5, 1.5]
    assert with_missing_eos_penalty(scores, ended, None).tolist() == [1.0, -2.0, 3.0]


def test_objective_metrics_by_hand() -> None:
    kl = torch.tensor([9.0, 1.0, -2.0, 9.0, 9.0, 4.0, 9.0, 9.0])
    batch = pair(old_logprobs=[9.0, -1.0, -2.0, 9.0, 9.0, -5.0, 9.0, 9.0])
    metrics = objective_metrics(kl, batch, Counts(tokens=9, sequences=4), kl_coef=0.5)
    expected = {"objective/kl": 3 / 4, "objective/entropy": 8 / 4, "objective/non_score_reward": -1.5 / 4}
    assert {name: value_of(metric) for name, metric in metrics.items()} == expected


def test_a_policy_loss_by_hand() -> None:
    old = [0.0, -3.0, -3.0, 0.0, 0.0, -3.0, 0.0, 0.0]
    batch = pair(old_logprobs=old, advantages=[9.0, 2.0, 2.0, 9.0, 9.0, -1.0, 9.0, 9.0])
    ratios = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0, 1.0])
    outputs = {
        "logprobs": (ratios.log() + torch.tensor(old)).requires_grad_(),
        "entropy": torch.tensor([9.0, 1.0, 2.0, 9.0, 9.0, 3.0, 9.0, 9.0]),
    }
    loss, metrics = ppo_policy_loss(outputs, batch, Counts(tokens=4, sequences=9), cliprange=0.2)
    # max(-4, -2.4), max(-1, -1.6), max(4, 1.2)
    assert loss.item() == pytest.approx((-2.4 - 1.0 + 4.0) / 4)
    ln2 = 0.6931471805599453
    expected = {
        "loss/policy_avg": 0.6 / 4,
        "policy/approxkl_avg": 0.5 * (1 + 1 + 4) * ln2**2 / 4,
        "policy/clipfrac_avg": 1 / 4,
        "policy/entropy_avg": 6 / 4,
        "val/ratio": 6.5 / 4,
        "val/ratio_var": (1 + 0.25 + 9) / 4,
    }
    assert {name: value_of(metric) for name, metric in metrics.items()} == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss, outputs["logprobs"])
    # the clipped token has none; d ratio / d logprob is the ratio
    assert gradient.tolist() == pytest.approx([0, 0, -0.5 * 2 / 4, 0, 0, 4 / 4, 0, 0])


def test_a_value_loss_by_hand() -> None:
    batch = pair(values=[9.0, 1.0, 1.0, 9.0, 9.0, 2.0, 9.0, 9.0], returns=[9.0, 2.0, 0.0, 9.0, 9.0, 2.5, 9.0, 9.0])
    outputs = {"values": torch.tensor([5.0, 1.5, 1.1, 5.0, 5.0, 2.4, 5.0, 5.0]).requires_grad_()}
    loss, metrics = ppo_value_loss(outputs, batch, Counts(tokens=5, sequences=9), cliprange_value=0.2, vf_coef=0.1)
    # clipped to 1.2, 1.1, 2.2: max(0.25, 0.64), 1.21, max(0.01, 0.09)
    assert value_of(metrics["loss/value_avg"]) == pytest.approx(0.5 * (0.64 + 1.21 + 0.09) / 5)
    assert loss.item() == pytest.approx(0.1 * 0.5 * (0.64 + 1.21 + 0.09) / 5)
    assert value_of(metrics["val/clipfrac_avg"]) == pytest.approx(2 / 5)
    (gradient,) = torch.autograd.grad(loss, outputs["values"])
    assert gradient.tolist() == pytest.approx([0, 0, 0.1 * 1.1 / 5, 0, 0, 0, 0, 0])


def ppo_data() -> dict[str, Tensor]:
    """Recorded completions with advantages of tokens, and values and returns of a critic."""
    data, generator = recorded(), torch.Generator().manual_seed(3)
    names = ("token_advantages", "new_values", "values", "returns")
    size = data["logprobs"].shape
    return data | {name: torch.randn(size, generator=generator, dtype=torch.float64) for name in names}


def ppo_batch(data: dict[str, Tensor], rows: Sequence[int] | None = None) -> Batch:
    named = {"old_logprobs": "old_logprobs", "advantages": "token_advantages", "values": "values", "returns": "returns"}
    columns = packed(data, list(named.values()), rows).token_columns
    plain = packed(data, (), rows)
    batch = Batch(tokens=plain.tokens, cu_seqlens=plain.cu_seqlens, num_sequences=plain.num_sequences)
    named["loss_mask"] = "loss_mask"
    return batch.with_token_columns(**{name: columns[source] for name, source in named.items()})


def test_the_policys_gradient_is_that_of_the_loss_written_out_on_a_full_vocabulary() -> None:
    data, leaf = with_graph(ppo_data())
    loss, metrics = ppo_policy_loss(outputs_of(data), ppo_batch(data), counts_of(data), cliprange=0.15)
    terms, clipped = [], 0
    for row, column in data["loss_mask"].nonzero().tolist():
        logits, advantage = leaf[row, column], data["token_advantages"][row, column]
        probability = logits.exp()[data["tokens"][row, column]] / logits.exp().sum()
        ratio = probability / data["old_logprobs"][row, column].exp()
        choices = [-advantage * ratio, -advantage * min(max(ratio, 0.85), 1.15)]
        terms.append(choices[0] if choices[0] >= choices[1] else choices[1])
        clipped += bool(choices[1] > choices[0])
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, leaf, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], theirs)
    assert value_of(metrics["policy/clipfrac_avg"]) == pytest.approx(clipped / len(terms)) and clipped > 0


def test_the_critics_gradient_is_that_of_the_loss_written_out() -> None:
    data = ppo_data()
    leaf = data["new_values"].clone().requires_grad_()
    data["new_values"] = leaf
    outputs = {"values": packed(data, ["new_values"])["new_values"]}
    loss, _ = ppo_value_loss(outputs, ppo_batch(data), counts_of(data), cliprange_value=0.3, vf_coef=0.5)
    terms = []
    for place in map(tuple, data["loss_mask"].nonzero().tolist()):
        value, old, target = leaf[place], data["values"][place], data["returns"][place]
        clipped = min(max(value, old - 0.3), old + 0.3)
        terms.append(max((value - target) ** 2, (clipped - target) ** 2))
    expected = 0.5 * 0.5 * sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, leaf, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], theirs)


def step(data: dict[str, Tensor], rows: Sequence[int]) -> tuple[Tensor, dict[str, Metric]]:
    """Both losses of a microbatch, and all metrics."""
    if rows:
        outputs = outputs_of(data, rows) | {"values": packed(data, ["new_values"], rows)["new_values"]}
        batch = ppo_batch(data, rows)
    else:
        names = ("logprobs", "entropy", "values")
        outputs = {name: torch.full((4,), -90.0, requires_grad=True) for name in names}
        batch = Batch.dummy(4)
    counts = counts_of(data)
    policy, metrics = ppo_policy_loss(outputs, batch, counts, cliprange=0.15)
    value, more = ppo_value_loss(outputs, batch, counts, cliprange_value=0.3, vf_coef=0.5)
    if not rows:
        (policy + value).backward()
        assert policy.item() == value.item() == 0 == outputs["logprobs"].grad.abs().sum()
        assert outputs["values"].grad.abs().sum() == 0
    return policy.double() + value.double(), metrics | more


@pytest.mark.parametrize("parts", [[[5, 3, 1, 0, 2, 4]], [[0], [1, 2], [3], [4, 5]], [[3], [5, 4, 2], [], [1, 0]]])
def test_which_sequences_share_a_microbatch_changes_nothing(parts: list[list[int]]) -> None:
    data = ppo_data()
    whole, whole_metrics = step(data, range(len(LENGTHS)))
    steps = [step(data, rows) for rows in parts]
    torch.testing.assert_close(sum(loss for loss, _ in steps), whole)
    for name, metric in whole_metrics.items():
        assert sum(value_of(metrics[name]) for _, metrics in steps) == pytest.approx(value_of(metric), rel=1e-6), name
