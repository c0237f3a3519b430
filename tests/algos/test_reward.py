"""The reward loss against TRL 1.16, autograd and hand arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megalign.algos.reward import reward_loss
from megalign.batch import Batch, Counts
from tests.algos.recorded import added, counts_of, silent_outputs
from tests.algos.trl_preference import trl_reward

SCORES = torch.tensor([1.5, 0.5, -2.0, 0.25, 0.75, 0.75, 3.0, -1.0], dtype=torch.float64)
MARGINS = torch.tensor([0.5, 1.0, 0.0, 2.5], dtype=torch.float64)
NAMES = {"min_reward", "mean_reward", "max_reward", "accuracy", "margin"}


def packed(rows: Sequence[int], margins: Tensor | None) -> Batch:
    """Sequences of 3 tokens, a dummy tail of 2."""
    columns = {} if margins is None else {"margin": margins.repeat_interleave(2)[list(rows)]}
    return Batch(
        tokens=torch.ones(3 * len(rows) + 2, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *[3] * len(rows), 2]).cumsum(0).int(),
        num_sequences=len(rows),
        token_columns={"loss_mask": torch.tensor([False, False, True] * len(rows) + [False] * 2)},
        sequence_columns=columns,
    )


def outputs_of(rows: Sequence[int]) -> dict[str, Tensor]:
    """What stands off the last tokens must not matter."""
    scores = torch.full((3 * len(rows) + 2,), -50.0, dtype=torch.float64)
    scores[2:-2:3] = SCORES[list(rows)]
    return {"scores": scores.requires_grad_()}


@pytest.mark.parametrize("margins", [None, MARGINS])
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.3])
def test_loss_gradient_and_metrics_are_trls(coefficient: float | None, margins: Tensor | None) -> None:
    leaf = SCORES.clone().requires_grad_()
    expected, expected_metrics = trl_reward(leaf, margins, center_rewards_coefficient=coefficient)
    expected.backward()
    outputs, batch = outputs_of(range(8)), packed(range(8), margins)
    loss, metrics = reward_loss(outputs, batch, counts_of([batch], {}), center_rewards_coefficient=coefficient)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(outputs["scores"].grad[2:-2:3], leaf.grad)
    assert outputs["scores"].grad.count_nonzero() == leaf.grad.count_nonzero() == 8
    assert added([metrics]) == pytest.approx(expected_metrics) and set(metrics) == NAMES


@pytest.mark.parametrize("parts", [[[4, 5, 0, 1, 6, 7, 2, 3]], [[2, 3], [], [6, 7, 0, 1], [4, 5]]])
def test_which_pairs_share_a_microbatch_changes_nothing(parts: list[list[int]]) -> None:
    batches = [packed(rows, MARGINS) if rows else Batch.dummy(4) for rows in parts]
    outputs = [outputs_of(rows) if rows else silent_outputs() for rows in parts]
    counts = counts_of(batches, {})
    shares = [
        reward_loss(output, batch, counts, center_rewards_coefficient=0.3)
        for output, batch in zip(outputs, batches, strict=True)
    ]
    whole, metrics = reward_loss(
        outputs_of(range(8)), packed(range(8), MARGINS), counts, center_rewards_coefficient=0.3
    )
    torch.testing.assert_close(sum(loss for loss, _ in shares), whole)
    assert added([share for _, share in shares]) == pytest.approx(added([metrics]))


def test_a_pair_by_hand() -> None:
    rows, margins = (0, 1), torch.tensor([0.4, 0.0, 0.0, 0.0], dtype=torch.float64)
    outputs = outputs_of(rows)
    counts = Counts(tokens=4, sequences=4)  # one pair of the step's two
    loss, metrics = reward_loss(outputs, packed(rows, margins), counts, center_rewards_coefficient=0.1)
    loss.backward()
    # scores 1.5 and 0.5, margin 0.4: log(1 + e^-0.6) + 0.1 * 2^2
    assert loss.item() == pytest.approx((0.4374879504858856 + 0.4) / 2)
    slope = 0.35434369377420455  # 1 / (1 + e^0.6)
    assert outputs["scores"].grad[2].item() == pytest.approx((-slope + 0.4) / 2)
    assert outputs["scores"].grad[5].item() == pytest.approx((slope + 0.4) / 2)
    expected = {"min_reward": 0.5, "mean_reward": 0.5, "max_reward": 1.5, "accuracy": 0.5, "margin": 0.5}
    assert added([metrics]) == pytest.approx(expected)


@pytest.mark.parametrize("sequences", [0.0, 4.0])
def test_a_batch_without_pairs_gives_an_exact_zero_with_a_graph(sequences: float) -> None:
    scores = torch.full((4,), -torch.inf, requires_grad=True)
    counts = Counts(tokens=sequences, sequences=sequences)
    loss, metrics = reward_loss({"scores": scores}, Batch.dummy(4), counts, center_rewards_coefficient=0.1)
    loss.backward()
    assert loss.item() == 0 and scores.grad.abs().sum() == 0
    assert metrics["min_reward"].value == torch.inf and metrics["max_reward"].value == -torch.inf
    assert all(metrics[name].value == 0 for name in ("mean_reward", "accuracy", "margin"))


def test_equal_texts_and_far_scores_keep_float32_finite() -> None:
    batch = packed(range(4), None)
    scores = torch.zeros(14)
    scores[2:-2:3] = torch.tensor([1.0, 1.0, -1e4, 1e4])
    scores.requires_grad_()
    loss, metrics = reward_loss({"scores": scores}, batch, counts_of([batch], {}), center_rewards_coefficient=None)
    loss.backward()
    assert loss.item() == pytest.approx((0.6931471805599453 + 2e4) / 2)
    assert scores.grad[2:-2:3].tolist() == [-0.25, 0.25, -0.5, 0.5]
    assert metrics["accuracy"].value == 0  # a tie is not a win
