"""Advantages over packed sequences and whitening, against plain loops in fp64 and hand arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalign.algos.gae import gae, moments, whitened
from megalign.batch import Batch

# two sequences of 5 tokens (a tool wrote the fourth) and 3, one without loss tokens, a tail
MASK = [False, True, True, False, True, False, True, True, False, False, False, False]
BOUNDS = [0, 5, 8, 10, 12]


def batch_of(mask: list[bool] = MASK, bounds: list[int] = BOUNDS) -> Batch:
    return Batch(
        tokens=torch.ones(len(mask), dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        num_sequences=len(bounds) - 2,
        token_columns={"loss_mask": torch.tensor(mask)},
    )


def column(seed: int, mask: list[bool] = MASK) -> Tensor:
    return torch.randn(len(mask), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(rewards: Tensor, values: Tensor, batch: Batch, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The sum over all later errors, written out as in arXiv 1506.02438 eq. 16, sequence by sequence."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(batch.num_sequences):
        start, end = batch.cu_seqlens[row : row + 2].tolist()
        steps = [t for t in range(start, end) if batch["loss_mask"][t]]
        after = [*steps, None][1:]
        deltas = [
            rewards[t] + (gamma * values[n] if n is not None else 0.0) - values[t]
            for t, n in zip(steps, after, strict=True)
        ]
        for place, t in enumerate(steps):
            advantages[t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[place:]))
            returns[t] = advantages[t] + values[t]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.5), (1.0, 0.0)])
def test_advantages_and_returns_are_the_written_out_sums(gamma: float, lam: float) -> None:
    batch, rewards, values = batch_of(), column(0), column(1)
    ours = gae(rewards, values, batch, gamma=gamma, lam=lam)
    for mine, expected in zip(ours, looped(rewards, values, batch, gamma=gamma, lam=lam), strict=True):
        torch.testing.assert_close(mine, expected)
        assert (mine != 0).tolist() == MASK


def test_a_sequence_by_hand() -> None:
    rewards = torch.tensor([9.0, 1.0, 0.0, 9.0, 2.0, 0, 0, 0, 0, 0, 0, 0])
    values = torch.tensor([9.0, 0.5, 1.0, 9.0, 4.0, 0, 0, 0, 0, 0, 0, 0])
    # errors 1 + 0.5 * 1 - 0.5 = 1, 0 + 0.5 * 4 - 1 = 1 (over the tool's token), 2 - 4 = -2; factor 0.5 * 0.5
    advantages, returns = gae(rewards, values, batch_of(), gamma=0.5, lam=0.5)
    assert advantages.tolist()[:5] == [0, 1 + 0.25 * 0.5, 1 - 0.25 * 2, 0, -2]
    assert returns.tolist()[:5] == [0, 1.625, 1.5, 0, 2]


def test_which_sequences_share_a_batch_changes_nothing() -> None:
    rewards, values = column(0), column(1)
    whole = gae(rewards, values, batch_of(), gamma=0.9, lam=0.8)[0]
    second = gae(rewards[5:8], values[5:8], batch_of(MASK[5:8], [0, 3, 3]), gamma=0.9, lam=0.8)[0]
    assert torch.equal(whole[5:8], second)


@pytest.mark.parametrize("batch", [Batch.dummy(4), batch_of([False] * 12)])
def test_a_batch_without_loss_tokens_has_no_advantages(batch: Batch) -> None:
    filler = torch.full((batch.num_tokens,), 7.0)
    advantages, returns = gae(filler, filler, batch, gamma=1.0, lam=0.95)
    assert advantages.tolist() == returns.tolist() == [0.0] * batch.num_tokens


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_over_all_parts(shift_mean: bool) -> None:
    values, mask = 3 + 2 * column(2), torch.tensor(MASK)
    chosen = values[mask]
    expected = (chosen - chosen.mean()) / (chosen.var() + 1e-8).sqrt() + (0 if shift_mean else chosen.mean())
    total = moments(values[:3], mask[:3]) + moments(values[3:], mask[3:])
    ours = torch.cat([whitened(part, m, total, shift_mean=shift_mean) for part, m in _halves(values, mask)])
    torch.testing.assert_close(ours[mask], expected)
    assert ours[~mask].abs().sum() == 0


def _halves(values: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(values[:3], mask[:3]), (values[3:], mask[3:])]


def test_whitening_by_hand() -> None:
    values, mask = torch.tensor([1.0, 100.0, 3.0, 5.0]), torch.tensor([True, False, True, True])
    assert moments(values, mask).tolist() == [3, 9, 35]
    # mean 3, Bessel's variance (4 + 0 + 4) / 2
    torch.testing.assert_close(
        whitened(values, mask, moments(values, mask), shift_mean=True), torch.tensor([-1.0, 0, 0, 1])
    )
    torch.testing.assert_close(
        whitened(values, mask, moments(values, mask), shift_mean=False), torch.tensor([2.0, 0, 3, 4])
    )


def test_equal_values_one_value_and_none_stay_finite() -> None:
    equal, mask = torch.full((4,), 1000.1), torch.tensor([True, True, True, False])
    assert whitened(equal, mask, moments(equal, mask), shift_mean=True).abs().max() < 1e-3
    one = torch.tensor([False, True, False, False])
    assert whitened(equal, one, moments(equal, one), shift_mean=True).tolist() == [0.0] * 4
    none = torch.zeros(4, dtype=torch.bool)
    values = torch.tensor([float("nan"), float("inf"), 1.0, 2.0])
    assert moments(values, none).tolist() == [0, 0, 0]
    assert whitened(values, none, moments(values, none), shift_mean=True).tolist() == [0.0] * 4
