"""ORPO against TRL 1.16 on the same logits, autograd of the written-out formula, and probabilities at 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megalign.algos.odds_ratio import ORPO_COUNTS, odds_ratios, orpo_loss
from megalign.algos.pairs import Pair
from megalign.batch import Batch, Counts
from tests.algos.recorded import added, counts_of, silent_outputs
from tests.algos.trl_preference import trl_orpo

PROMPTS = (3, 3, 1, 1, 2, 2)
LENGTHS = (4, 2, 3, 6, 1, 5)  # completion tokens
VOCAB, BETA = 9, 0.4
ROWS = range(len(PROMPTS))
NOT_TRLS = {"logits/chosen", "logits/rejected"}


class Case(NamedTuple):
    """Padded as TRL has them: logits [S, L, V] of the token AFTER each, tokens [S, L]."""

    logits: Tensor
    tokens: Tensor

    def packed(self, rows: Sequence[int] = ROWS) -> Batch:
        """The rows with a dummy tail of 2."""
        totals = [PROMPTS[row] + LENGTHS[row] for row in rows]
        pieces = [(torch.arange(total), row) for total, row in zip(totals, rows, strict=True)]
        tail = torch.zeros(2, dtype=torch.bool)
        completion = torch.cat([*(place >= PROMPTS[row] for place, row in pieces), tail])
        loss = torch.cat([*(place >= (PROMPTS[row] if row % 2 else 1) for place, row in pieces), tail])
        return Batch(
            tokens=torch.cat([*(self.tokens[row, place] for place, row in pieces), tail.long()]),
            cu_seqlens=torch.tensor([0, *totals, 2]).cumsum(0).int(),
            num_sequences=len(rows),
            token_columns={"loss_mask": loss, "completion_mask": completion.float()},
        )

    def outputs(self, rows: Sequence[int] = ROWS) -> dict[str, Tensor]:
        """The engine's columns: 0 off the loss mask."""
        batch = self.packed(rows)
        first = self.logits.new_zeros(1, VOCAB)
        pieces = [torch.cat([first, self.logits[row, : PROMPTS[row] + LENGTHS[row] - 1]]) for row in rows]
        logits = torch.cat([*pieces, first, first])
        columns = {
            "logprobs": logits.log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0],
            "mean_logits": logits.detach().mean(-1),
        }
        return {name: column.masked_fill(~batch["loss_mask"], 0.0) for name, column in columns.items()}


def case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    size = (len(PROMPTS), max(prompt + length for prompt, length in zip(PROMPTS, LENGTHS, strict=True)))
    logits = torch.randn(*size, VOCAB, generator=generator, dtype=torch.float64, requires_grad=True)
    return Case(logits, torch.randint(VOCAB, size, generator=generator))


def masks() -> tuple[Tensor, Tensor]:
    """[S, L] completions, and all real tokens."""
    place = torch.arange(max(prompt + length for prompt, length in zip(PROMPTS, LENGTHS, strict=True)))
    prompts, ends = torch.tensor(PROMPTS)[:, None], (torch.tensor(PROMPTS) + torch.tensor(LENGTHS))[:, None]
    return (place >= prompts) & (place < ends), place < ends


@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_and_metrics_are_trls(seed: int) -> None:
    data = case(seed)
    expected, expected_metrics = trl_orpo(data.logits, data.tokens, *masks(), beta=BETA)
    batch = data.packed()
    loss, metrics = orpo_loss(data.outputs(), batch, counts_of([batch], ORPO_COUNTS), beta=BETA)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # TRL takes the odds in float32
    theirs = torch.autograd.grad(expected, data.logits)[0]
    assert theirs.abs().sum() > 0.1
    torch.testing.assert_close(torch.autograd.grad(loss, data.logits)[0], theirs, rtol=1e-5, atol=1e-7)
    assert set(metrics) == set(expected_metrics)
    ours = added([metrics])
    for name in set(metrics) - NOT_TRLS:
        assert ours[name] == pytest.approx(expected_metrics[name], rel=1e-5, abs=1e-7), name


def test_loss_and_gradient_are_those_of_the_formula_from_full_logits() -> None:
    data = case()
    logprob = [
        [torch.softmax(data.logits[row, t - 1], 0)[data.tokens[row, t]].log() for t in range(1, data.tokens.shape[1])]
        for row in ROWS
    ]
    nlls, ratios = [], []
    for row in ROWS[0::2]:
        odds = []
        for side in (row, row + 1):
            start, end = PROMPTS[side] - 1, PROMPTS[side] - 1 + LENGTHS[side]
            p = torch.exp(sum(logprob[side][start:end]) / LENGTHS[side])
            odds.append(p / (1 - p))
        ratios.append(torch.log(1 / (1 + odds[1] / odds[0])))
        nlls += [-value for value in logprob[row][: PROMPTS[row] - 1 + LENGTHS[row]]]
    expected = sum(nlls) / len(nlls) - BETA * sum(ratios) / len(ratios)
    batch = data.packed()
    loss, _ = orpo_loss(data.outputs(), batch, counts_of([batch], ORPO_COUNTS), beta=BETA)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, data.logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, data.logits)[0])


def test_logits_are_means_over_completion_tokens() -> None:
    data, (completions, _) = case(), masks()
    batch = data.packed()
    _, metrics = orpo_loss(data.outputs(), batch, counts_of([batch], ORPO_COUNTS), beta=BETA)
    predicting = completions.roll(-1, dims=1)  # the position before a token has its logits
    for name, start in (("chosen", 0), ("rejected", 1)):
        expected = data.logits[start::2][predicting[start::2]].mean()
        assert metrics[f"logits/{name}"].value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("parts", [[[4, 5, 0, 1, 2, 3]], [[2, 3], [], [4, 5, 0, 1]], [[0, 1], [2, 3], [4, 5]]])
def test_which_pairs_share_a_microbatch_changes_nothing(parts: list[list[int]]) -> None:
    data = case()
    batches = [data.packed(rows) if rows else Batch.dummy(4) for rows in parts]
    counts = counts_of(batches, ORPO_COUNTS)
    whole, metrics = orpo_loss(data.outputs(), data.packed(), counts, beta=BETA)
    shares = [
        orpo_loss(data.outputs(rows) if rows else silent_outputs(), batch, counts, beta=BETA)
        for rows, batch in zip(parts, batches, strict=True)
    ]
    total = sum(loss for loss, _ in shares)
    torch.testing.assert_close(total, whole)
    assert added([share for _, share in shares]) == pytest.approx(added([metrics]))
    ours, theirs = (torch.autograd.grad(loss, data.logits)[0] for loss in (total, whole))
    torch.testing.assert_close(ours, theirs)


def test_a_batch_without_pairs_gives_an_exact_zero_with_a_graph() -> None:
    outputs = silent_outputs()
    named = {"chosen_tokens": 9, "chosen_completion_tokens": 5, "rejected_tokens": 4}
    for counts in (Counts(tokens=13, sequences=4, named=named), counts_of([Batch.dummy(4)], ORPO_COUNTS)):
        loss, metrics = orpo_loss(outputs, Batch.dummy(4), counts, beta=BETA)
        outputs["logprobs"].grad = None
        loss.backward()
        assert loss.item() == 0 and outputs["logprobs"].grad.abs().sum() == 0
        assert len(metrics) == 11 and not any(added([metrics]).values())


def test_odds_of_probabilities_next_to_1_keep_their_digits_in_float32() -> None:
    logps = torch.tensor([-1e-6, -1e-3, -0.5, -40.0, -5000.0])
    other = torch.full((5,), -1.0)
    exact = [logp - math.log(-math.expm1(logp)) for logp in logps.tolist()]
    log_odds = odds_ratios(Pair(logps, other)) + (-1 - math.log(-math.expm1(-1)))
    torch.testing.assert_close(log_odds, torch.tensor(exact), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-7, -1e-7), (-1e4, 0.0)])
def test_sure_completions_give_finite_losses_and_gradients_in_float32(chosen: float, rejected: float) -> None:
    """Also what an empty completion looks like; TRL's gradient is NaN where a probability rounds to 1."""
    batch = Batch(
        tokens=torch.zeros(6, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32),
        num_sequences=2,
        token_columns={
            "loss_mask": torch.tensor([0, 1, 1, 0, 0, 1]) > 0,
            "completion_mask": torch.tensor([0.0, 0, 1, 0, 0, 1]),
        },
    )
    logprobs = torch.tensor([0.0, -0.5, chosen, 0.0, 0.0, rejected], requires_grad=True)
    loss, metrics = orpo_loss({"logprobs": logprobs}, batch, counts_of([batch], ORPO_COUNTS), beta=BETA)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert all(metric.value.isfinite() for metric in metrics.values())


def test_empty_completions_give_finite_losses_and_gradients() -> None:
    logprobs = torch.full((8,), -0.7, requires_grad=True)
    for completion in ([0] * 8, [0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]):
        mask = torch.tensor([0, 1, 1, 1, 0, 0, *completion[6:]]) > 0
        batch = Batch(
            tokens=torch.zeros(8, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32),
            num_sequences=2,
            token_columns={"loss_mask": mask, "completion_mask": torch.tensor(completion).float()},
        )
        loss, _ = orpo_loss({"logprobs": logprobs}, batch, counts_of([batch], ORPO_COUNTS), beta=BETA)
        logprobs.grad = None
        loss.backward()
        assert loss.isfinite() and logprobs.grad.isfinite().all()
        torch.testing.assert_close(logprobs.grad[1], torch.tensor(-1 / 3))  # a prompt token's part of the NLL
