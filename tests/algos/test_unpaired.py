"""KTO against TRL 1.16 on the same tensors, autograd of written-out formulas and hand arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalign.algos.unpaired import KTO_COUNTS, WeightRanges, kto_loss, recommended_weights
from megalign.batch import Batch, Counts, Metric
from tests.algos.recorded import Recorded, added, counts_of, outputs_of, recorded, silent_outputs
from tests.algos.trl_preference import trl_kto

BASE: dict[str, Any] = {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
LABELS = (True, False, False, True, True, False, False)
KL_LOGPS = torch.tensor([-9.0, -4.0, -7.0, -3.0, -8.0, -5.0, -6.0], dtype=torch.float64)
LOSS_TYPES = ("kto", "apo_zero_unpaired")


def case(labels: Sequence[bool] = LABELS, kl: float = 0.8) -> Recorded:
    columns = {"desirable": torch.tensor(labels).double(), "kl": torch.full((len(labels),), kl, dtype=torch.float64)}
    return replace(recorded(len(labels)), sequence_columns=columns)


def share(
    data: Recorded, rows: Sequence[int], counts: Counts, given: dict[str, Any]
) -> tuple[Tensor, dict[str, Metric], Tensor]:
    """A microbatch's share of loss and metrics, and of the gradient [S, W], at its rows."""
    if not rows:
        return *kto_loss(silent_outputs(), Batch.dummy(4), counts, **given), torch.zeros(())
    outputs = outputs_of(data, rows)
    loss, metrics = kto_loss(outputs, data.packed(rows), counts, **given)
    loss.backward()
    return loss.detach(), metrics, data.table_of(outputs["logprobs"].grad, rows)


def whole(data: Recorded, given: dict[str, Any]) -> tuple[Tensor, dict[str, Metric], Tensor]:
    return share(data, range(len(data.prompts)), counts_of([data.packed()], KTO_COUNTS), given)


@pytest.mark.parametrize("drift", [0.8, -0.8])
@pytest.mark.parametrize("labels", [LABELS, [True] * 3, [False] * 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_metrics_are_trls(loss_type: str, labels: Sequence[bool], drift: float) -> None:
    policy = KL_LOGPS[: len(labels)]
    reference = policy - drift + torch.linspace(-1, 1, len(labels), dtype=torch.float64)
    data, given = case(labels, max(drift, 0.0)), {**BASE, "loss_type": loss_type}
    leaf = data.tables["logprobs"].clone().requires_grad_()
    tables = {**data.tables, "logprobs": leaf}
    expected, expected_metrics = trl_kto(tables, torch.tensor(labels), policy, reference, **given)
    expected.backward()
    loss, metrics, grad = whole(data, given)
    torch.testing.assert_close(loss, expected.detach())
    assert leaf.grad.abs().sum() > 1e-2
    torch.testing.assert_close(grad, leaf.grad)
    # a kind that the step lacks has no metrics: TRL averages over the steps that have it
    assert added([metrics]) == pytest.approx(expected_metrics)
    assert len(metrics) == (9 if len(set(labels)) == 2 else 5)


@pytest.mark.parametrize("parts", [[[5, 3, 1, 0, 2, 6, 4]], [[3], [0, 4], [], [1, 2, 5, 6]], [[i] for i in range(7)]])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_which_sequences_share_a_microbatch_changes_nothing(loss_type: str, parts: list[list[int]]) -> None:
    data, given = case(), {**BASE, "loss_type": loss_type}
    loss, metrics, grad = whole(data, given)
    counts = counts_of([data.packed(rows) if rows else Batch.dummy(4) for rows in parts], KTO_COUNTS)
    losses, shares, grads = zip(*(share(data, rows, counts, given) for rows in parts), strict=True)
    torch.testing.assert_close(sum(losses), loss, check_dtype=False)
    torch.testing.assert_close(sum(grads), grad, check_dtype=False)
    assert len({tuple(names) for names in shares}) == 1  # a rank's own kinds decide nothing
    assert added(shares) == pytest.approx(added([metrics]))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_those_of_the_formula_from_full_logits(loss_type: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, ref_logits = torch.randn(2, 12, 9, generator=generator, dtype=torch.float64).unbind()
    logits.requires_grad_()
    tokens = torch.randint(9, (12,), generator=generator)
    spans, z, beta = {(1, 4): True, (5, 7): False, (9, 12): True}, 0.25, 0.3
    mask = torch.zeros(12, dtype=torch.bool)
    terms = []
    for (start, end), good in spans.items():
        mask[start:end] = True
        r = sum(
            torch.log(torch.softmax(logits[t], 0)[tokens[t]] / torch.softmax(ref_logits[t], 0)[tokens[t]])
            for t in range(start, end)
        )
        shift = z if loss_type == "kto" else 0.0
        value = 1 / (1 + torch.exp(-beta * (r - shift) if good else beta * (r - shift)))
        terms.append((1.3 if good else 0.7) * (1 - value))
    expected = sum(terms) / 3
    batch = Batch(
        tokens=tokens,
        cu_seqlens=torch.tensor([0, 4, 7, 12], dtype=torch.int32),
        num_sequences=3,
        token_columns={"loss_mask": mask, "ref_logprobs": ref_logits.log_softmax(-1)[range(12), tokens] * mask},
        sequence_columns={"desirable": torch.tensor([1.0, 0.0, 1.0]), "kl": torch.full((3,), z)},
    )
    outputs = {"logprobs": logits.log_softmax(-1)[range(12), tokens] * mask}
    loss, _ = kto_loss(outputs, batch, counts_of([batch], KTO_COUNTS), **{**BASE, "loss_type": loss_type})
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_sequences_gives_an_exact_zero_with_a_graph(loss_type: str) -> None:
    outputs = silent_outputs()
    named = {"desirable": 3, "undesirable": 2, "desirable_tokens": 7, "undesirable_tokens": 2}
    full = Counts(tokens=9, sequences=5, named=named)
    for counts in (full, counts_of([Batch.dummy(4)], KTO_COUNTS)):
        loss, metrics = kto_loss(outputs, Batch.dummy(4), counts, **{**BASE, "loss_type": loss_type})
        outputs["logprobs"].grad = None
        loss.backward()
        assert loss.item() == 0 and outputs["logprobs"].grad.abs().sum() == 0
        assert not any(added([metrics]).values()) and len(metrics) == (9 if counts is full else 2)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_completions_and_huge_log_ratios_keep_float32_finite(loss_type: str) -> None:
    batch = Batch(
        tokens=torch.zeros(6, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1, 2, 4, 6], dtype=torch.int32),
        num_sequences=4,
        token_columns={"loss_mask": torch.tensor([0, 0, 0, 1, 0, 1]) > 0, "ref_logprobs": torch.zeros(6)},
        sequence_columns={"desirable": torch.tensor([1.0, 0.0, 1.0, 0.0]), "kl": torch.full((4,), 2.0)},
    )
    logprobs = torch.tensor([0.0, 0.0, 0.0, -5000.0, 0.0, -5000.0], requires_grad=True)
    counts = counts_of([batch], KTO_COUNTS)
    loss, metrics = kto_loss({"logprobs": logprobs}, batch, counts, **{**BASE, "loss_type": loss_type})
    loss.backward()
    # the two that the policy has left are lost and won for sure; the empty ones have log ratio 0
    z = torch.tensor(0.6 if loss_type == "kto" else 0.0)
    assert loss.item() == pytest.approx((1.3 + 1.3 * z.sigmoid().item() + 0.7 * (-z).sigmoid().item()) / 4)
    assert logprobs.grad.abs().sum() == 0
    assert metrics["rewards/chosen"].value.item() == pytest.approx(-750.0)


def test_recommended_weights_by_hand() -> None:
    # 4 good and 6 bad answers: 1 * 6 / 4 = 1.5 to 1.33 * 1.5 = 1.995, or 4 / 6 / 1.33 = 0.501 to 4 / 6 = 0.667
    ranges = WeightRanges(desirable=(1.5, 2.0), undesirable=(0.5, 0.67))
    assert recommended_weights(4, 6, desirable_weight=1.0, undesirable_weight=1.0) == ranges
    assert recommended_weights(4, 6, desirable_weight=1.6, undesirable_weight=1.0) is None
    assert recommended_weights(4, 6, desirable_weight=1.0, undesirable_weight=0.6) is None
    assert recommended_weights(5, 5, desirable_weight=3.0, undesirable_weight=1.0) is None
    alone = WeightRanges(desirable=(0.2, 0.27), undesirable=(3.76, 5.0))
    assert recommended_weights(5, 0, desirable_weight=1.0, undesirable_weight=1.0) == alone
