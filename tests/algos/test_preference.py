"""DPO against TRL 1.16 on the same tensors: loss, gradient and metrics of every loss type and option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalign.algos.dpo_losses import LOSSES
from megalign.algos.pairs import Pair, reward_metrics
from megalign.algos.preference import DPO_COUNTS, aot_targets, dpo_loss, sequence_logprobs
from megalign.batch import Batch, Counts, Metric
from tests.algos.recorded import Recorded, added, counts_of, outputs_of, recorded, silent_outputs
from tests.algos.trl_preference import trl_dpo

BASE: dict[str, Any] = {
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.3,
    "label_smoothing": 0.2,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
}
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
AOT = ("aot", "aot_unpaired")
ALL = sorted(LOSSES)


def options(*loss_types: str, **others: Any) -> dict[str, Any]:
    return {**BASE, "loss_types": list(loss_types), "loss_weights": [1.0] * len(loss_types), **others}


def with_targets(data: Recorded, ld_alpha: float | None) -> Recorded:
    """The columns of a trainer's pass over the global batch."""
    batch = data.packed()
    logps = sequence_logprobs(batch["logprobs"], batch, ld_alpha=ld_alpha)
    reference = sequence_logprobs(batch["ref_logprobs"], batch, ld_alpha=ld_alpha)
    targets = {f"{name}_target": aot_targets(logps, reference, name) for name in AOT}
    return replace(data, sequence_columns={**data.sequence_columns, **targets})


def ours(data: Recorded, given: dict[str, Any]) -> tuple[Tensor, dict[str, float], Tensor]:
    """Loss, metrics, and the gradient of the log probabilities [S, W], of all rows in one batch."""
    data = with_targets(data, given["ld_alpha"])
    loss, metrics, grad = share(data, range(len(data.prompts)), counts_of([data.packed()], DPO_COUNTS), given)
    return loss, added([metrics]), grad


def share(
    data: Recorded, rows: Sequence[int], counts: Counts, given: dict[str, Any]
) -> tuple[Tensor, dict[str, Metric], Tensor]:
    """A microbatch's share of loss and metrics, and of the gradient [S, W], at its rows."""
    if not rows:
        return *dpo_loss(silent_outputs(), Batch.dummy(4), counts, **given), torch.zeros(())
    outputs = outputs_of(data, rows)
    loss, metrics = dpo_loss(outputs, data.packed(rows), counts, **given)
    loss.backward()
    return loss.detach(), metrics, data.table_of(outputs["logprobs"].grad, rows)


def theirs(data: Recorded, given: dict[str, Any]) -> tuple[Tensor, dict[str, float], Tensor]:
    leaf = data.tables["logprobs"].clone().requires_grad_()
    loss, metrics = trl_dpo({**data.tables, "logprobs": leaf}, **given)
    loss.backward()
    return loss.detach(), metrics, leaf.grad


def check_equal(data: Recorded, given: dict[str, Any], *, rtol: float = 1e-6) -> None:
    (loss, metrics, grad), (expected, expected_metrics, expected_grad) = ours(data, given), theirs(data, given)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=1e-3 * rtol)
    assert expected_grad.abs().sum() > 1e-3
    assert metrics == pytest.approx(expected_metrics, rel=rtol, abs=1e-3 * rtol) and len(metrics) == 10


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.4])
@pytest.mark.parametrize("loss_type", ALL)
def test_loss_gradient_and_metrics_are_trls(loss_type: str, ld_alpha: float | None) -> None:
    for seed in range(3):
        check_equal(recorded(seed=seed), options(loss_type, ld_alpha=ld_alpha))


@pytest.mark.parametrize("loss_type", WITH_DIVERGENCE)
def test_divergences_are_trls(loss_type: str) -> None:
    for kind in ("forward_kl", "js_divergence"):
        check_equal(recorded(), options(loss_type, f_divergence_type=kind))
    single = recorded(dtype=torch.float32)  # TRL's alpha divergence knows no float64
    for alpha in (0.5, 2.0, 1.0 + 1e-7):
        given = options(loss_type, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
        check_equal(single, given, rtol=1e-4)


def test_the_exponent_of_the_alpha_divergence_is_clamped_as_in_trl() -> None:
    data = recorded(2, dtype=torch.float32)
    data.tables["ref_logprobs"][0, 0] -= 200.0  # a log ratio of 200, with alpha 2 an exponent of 200
    given = options("hinge", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0)
    (loss, _, grad), (expected, _, expected_grad) = ours(data, given), theirs(data, given)
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=2e-5, atol=0)
    data.tables["ref_logprobs"][0, 0] += 400.0  # the rejected sequence wins: a hinge of about 5e34
    data.tables["ref_logprobs"][1, 0] -= 200.0
    (loss, _, grad), (expected, _, expected_grad) = ours(data, given), theirs(data, given)
    assert 1e33 < expected.item() < torch.inf
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=2e-5, atol=0)


@pytest.mark.parametrize("loss_type", [name for name in ALL if name not in (*AOT, "sft", "hinge")])
def test_weighting_is_trls(loss_type: str) -> None:
    check_equal(recorded(), options(loss_type, use_weighting=True))


def test_weighted_hinge_has_trls_value() -> None:
    """TRL multiplies relu's result in place, after which torch refuses its backward pass."""
    data, given = recorded(), options("hinge", use_weighting=True)
    with torch.no_grad():
        expected, metrics = trl_dpo(data.tables, **given)
    loss, our_metrics, _ = ours(data, given)
    torch.testing.assert_close(loss, expected)
    assert our_metrics == pytest.approx(metrics)
    with pytest.raises(RuntimeError, match="inplace operation"):
        theirs(data, given)


def test_weighted_sft_is_trls_where_trl_has_it() -> None:
    """With more than one pair TRL multiplies an expanded tensor in place, which torch refuses."""
    given = options("sft", use_weighting=True)
    check_equal(recorded(2), given)
    with pytest.raises(RuntimeError, match="single memory location"):
        theirs(recorded(4), given)
    # ours: every token of a pair's chosen completion has the weight of the pair
    data = recorded(4)
    mask, logprobs = data.tables["loss_mask"], data.tables["logprobs"]
    aligned = (logprobs - data.tables["log_sum_squares"]) * mask
    weights = (aligned.sum(1) / mask.sum(1)).exp()
    nll = -(logprobs * mask).sum(1)
    expected = sum(weights[row] * weights[row + 1] * nll[row] for row in (0, 2)) / mask[0::2].sum()
    torch.testing.assert_close(ours(data, given)[0], expected)


def test_a_weighted_list_is_trls() -> None:
    given = options("sigmoid", "bco_pair", "sft", loss_weights=[0.8, 0.2, 1.5])  # MPO
    check_equal(recorded(), given)
    check_equal(recorded(), options("aot_unpaired", "ipo", "aot", loss_weights=[0.5, 2.0, 0.7], ld_alpha=0.5))
    plain = options("sigmoid", "hinge", loss_weights=[1.0, 1.0])
    torch.testing.assert_close(ours(recorded(), {**plain, "loss_weights": None})[0], theirs(recorded(), plain)[0])


@pytest.mark.parametrize(
    "parts", [[[6, 7, 0, 1, 4, 5, 2, 3]], [[2, 3], [], [6, 7, 0, 1], [4, 5]], [[0, 1], [2, 3], [4, 5], [6, 7]]]
)
@pytest.mark.parametrize("loss_type", ALL)
def test_which_pairs_share_a_microbatch_changes_nothing(loss_type: str, parts: list[list[int]]) -> None:
    given = options(loss_type, ld_alpha=0.5, use_weighting=loss_type not in AOT)
    data = with_targets(recorded(), 0.5)
    whole, whole_metrics, whole_grad = ours(recorded(), given)
    counts = counts_of([data.packed(rows) if rows else Batch.dummy(4) for rows in parts], DPO_COUNTS)
    losses, metrics, grads = zip(*(share(data, rows, counts, given) for rows in parts), strict=True)
    torch.testing.assert_close(sum(losses), whole, check_dtype=False)
    assert added(metrics) == pytest.approx(whole_metrics, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(sum(grads), whole_grad, check_dtype=False)


@pytest.mark.parametrize("loss_type", ALL)
def test_a_batch_without_pairs_gives_an_exact_zero_with_a_graph(loss_type: str) -> None:
    outputs = silent_outputs()
    given = options(loss_type, ld_alpha=0.5, use_weighting=loss_type not in AOT)
    empty = counts_of([Batch.dummy(4)], DPO_COUNTS)
    for counts in (empty, Counts(tokens=9, sequences=4, named={"chosen_tokens": 5, "rejected_tokens": 4})):
        loss, metrics = dpo_loss(outputs, Batch.dummy(4), counts, **given)
        outputs["logprobs"].grad = None
        loss.backward()
        assert loss.item() == 0 and outputs["logprobs"].grad.abs().sum() == 0
        assert len(metrics) == 10 and not any(added([metrics]).values())


def test_metrics_of_columns_that_the_engine_does_not_give_are_left_out() -> None:
    data = recorded()
    batch = data.packed()
    outputs = {"logprobs": outputs_of(data)["logprobs"]}
    _, metrics = dpo_loss(outputs, batch, counts_of([batch], DPO_COUNTS), **BASE)
    names = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    assert set(metrics) == names | {"logps/chosen", "logps/rejected"}


def test_long_answers_keep_their_digits_in_fp32() -> None:
    """Each answer's log probability is some thousands, and the policy's and the reference's differ by less than 1."""
    draw = torch.Generator().manual_seed(0)
    lengths = [600, 550, 580, 590]
    exact = -8 + torch.randn(sum(lengths), generator=draw, dtype=torch.float64)
    reference = exact + 0.02 * torch.randn(len(exact), generator=draw, dtype=torch.float64)
    batch = Batch(
        tokens=torch.ones(len(exact), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        num_sequences=len(lengths),
        token_columns={"loss_mask": torch.ones(sum(lengths), dtype=torch.bool)},
    )
    found = {}
    for dtype in (torch.float64, torch.float32):
        policy = exact.float().to(dtype)
        here = batch.with_token_columns(ref_logprobs=reference.float().to(dtype))
        sums = [sequence_logprobs(column, here, ld_alpha=None) for column in (policy, here["ref_logprobs"])]
        here = here.with_sequence_columns(**{f"{name}_target": aot_targets(*sums, name) for name in AOT})
        losses = []
        for name in ("sigmoid", *AOT):
            loss, metrics = dpo_loss({"logprobs": policy}, here, counts_of([here], DPO_COUNTS), **options(name))
            losses.append(float(loss))
        found[dtype] = [added([metrics])["rewards/margins"], *losses]
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=3e-7)


def test_two_answers_that_are_the_same_are_a_tie_whatever_the_last_digit() -> None:
    """Ranks' sums differ in what fp32 would not show; TRL's are fp32."""
    counts = Counts(tokens=2.0, sequences=2.0)
    equal = Pair(torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    assert reward_metrics(equal, counts)["rewards/accuracies"].value == 0
    better = Pair(torch.tensor([1.0 + 1e-6], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    assert reward_metrics(better, counts)["rewards/accuracies"].value == 1
