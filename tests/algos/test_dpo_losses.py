"""DPO's gradients against autograd of written-out formulas of full-vocabulary logits, AOT's ranks by hand, and inputs
at the edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, exp, log

from megalign.algos.dpo_losses import LOSSES, divergence_scores
from megalign.algos.preference import DPO_COUNTS, aot_targets, dpo_loss, sequence_logprobs
from megalign.batch import Batch
from tests.algos.recorded import counts_of

AOT = ("aot", "aot_unpaired")
BETA, EPSILON, TAU = 0.3, 0.2, 0.5
BASE: dict[str, Any] = {
    "loss_weights": [1.0],
    "beta": BETA,
    "label_smoothing": EPSILON,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": TAU,
}
LENGTHS = ((3, 5), (4, 2), (6, 6), (1, 4))  # completion tokens of each pair; every prompt has 2
VOCAB = 11


def s(x: Tensor) -> Tensor:
    return 1 / (1 + exp(-x))


class Row(NamedTuple):
    """A pair's sums over completion tokens, of the policy and of the reference."""

    c: Tensor
    r: Tensor
    ref_c: Tensor
    ref_r: Tensor
    num_c: int
    num_r: int

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        return self.c - self.ref_c, self.r - self.ref_r

    @property
    def z(self) -> Tensor:
        return BETA * (self.c - self.ref_c - self.r + self.ref_r)

    @property
    def per_token(self) -> Tensor:
        return (self.c - self.ref_c) / self.num_c - (self.r - self.ref_r) / self.num_r


def nca(row: Row) -> Tensor:
    c, r = row.ratios
    return -log(s(BETA * c)) - 0.5 * log(s(-BETA * c)) - 0.5 * log(s(-BETA * r))


def exo(row: Row) -> Tensor:
    p = s(row.z)
    return p * log(p / (1 - EPSILON)) + (1 - p) * log((1 - p) / EPSILON)


def smoothed(z: Tensor) -> Tensor:
    return -(1 - EPSILON) * log(s(z)) - EPSILON * log(s(-z))


# One loss for each pair, as in the papers.
FORMULAS: dict[str, Callable[[Row], Tensor]] = {
    "sigmoid": lambda row: -log(s(row.z)),
    "hinge": lambda row: torch.maximum(1 - row.z, torch.zeros_like(row.z)),
    "ipo": lambda row: (row.per_token - 1 / (2 * BETA)) ** 2,
    "exo_pair": exo,
    "nca_pair": nca,
    "robust": lambda row: ((1 - EPSILON) * -log(s(row.z)) - EPSILON * -log(s(-row.z))) / (1 - 2 * EPSILON),
    "bco_pair": lambda row: -log(s(BETA * row.ratios[0])) - log(s(-BETA * row.ratios[1])),
    "sppo_hard": lambda row: (row.ratios[0] - 1 / (2 * BETA)) ** 2 + (row.ratios[1] + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda row: 1 - s(BETA * row.ratios[0]) + s(BETA * row.ratios[1]),
    "apo_down": lambda row: s(BETA * row.ratios[0]) + 1 - s(row.z),
    "discopop": lambda row: -log(s(row.z)) * (1 - s(row.z / TAU)) + exp(-row.z) * s(row.z / TAU),
    "sigmoid_norm": lambda row: -log(s(BETA * row.per_token)),
    "sft": lambda row: -row.c * len(LENGTHS) / sum(num for num, _ in LENGTHS),  # over the step's chosen tokens
}


class Case(NamedTuple):
    """Logits of policy and reference, [T, V], logits[t] of tokens[t], and what the engine makes of the policy's."""

    logits: Tensor
    ref_logits: Tensor
    batch: Batch
    outputs: dict[str, Tensor]


def case(lengths: tuple[tuple[int, int], ...] = LENGTHS, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    sequences = [2 + length for pair in lengths for length in pair]
    total = sum(sequences)
    logits, ref_logits = torch.randn(2, total, VOCAB, generator=generator, dtype=torch.float64).unbind()
    logits.requires_grad_()
    batch = Batch(
        tokens=torch.randint(VOCAB, (total,), generator=generator),
        cu_seqlens=torch.tensor([0, *sequences]).cumsum(0).int(),
        num_sequences=len(sequences),
        token_columns={"loss_mask": torch.cat([torch.arange(length) >= 2 for length in sequences])},
    )
    mask = batch["loss_mask"]
    probabilities = logits.softmax(-1)
    outputs = {
        "logprobs": logits.log_softmax(-1)[range(total), batch.tokens] * mask,
        "log_sum_squares": probabilities.square().sum(-1).log().detach() * mask,
    }
    ref_logprobs = ref_logits.log_softmax(-1)[range(total), batch.tokens] * mask
    return Case(logits, ref_logits, batch.with_token_columns(ref_logprobs=ref_logprobs), outputs)


def spans(batch: Batch) -> list[tuple[int, int]]:
    """Where each sequence's completion begins and ends."""
    bounds = batch.cu_seqlens.tolist()
    return [(start + 2, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def rows_of(given: Case) -> list[Row]:
    """Each pair's sums, token by token from the logits."""

    def total(logits: Tensor, start: int, end: int) -> Tensor:
        terms = [logits[t, given.batch.tokens[t]] - exp(logits[t]).sum().log() for t in range(start, end)]
        return sum(terms, torch.zeros((), dtype=torch.float64))

    where = spans(given.batch)
    rows = []
    for chosen, rejected in zip(where[0::2], where[1::2], strict=True):
        sums = [total(logits, *span) for logits in (given.logits, given.ref_logits) for span in (chosen, rejected)]
        rows.append(Row(*sums, chosen[1] - chosen[0], rejected[1] - rejected[0]))
    return rows


def weights_of(given: Case) -> list[Tensor]:
    """WPO's weight of each pair."""

    def weight(start: int, end: int) -> Tensor:
        p = given.logits[start:end].detach().softmax(-1)
        own = p[range(end - start), given.batch.tokens[start:end]]
        return (own / (p**2).sum(-1)).log().mean().exp()

    each = [weight(*span) for span in spans(given.batch)]
    return [chosen * rejected for chosen, rejected in zip(each[0::2], each[1::2], strict=True)]


def check_gradient(given: Case, expected: Tensor, **options: Any) -> None:
    loss, _ = dpo_loss(given.outputs, given.batch, counts_of([given.batch], DPO_COUNTS), **{**BASE, **options})
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, given.logits, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected, given.logits)[0]
    assert theirs.abs().sum() > 1e-2
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_weighting", [False, True])
@pytest.mark.parametrize("loss_type", FORMULAS)
def test_loss_and_gradient_are_those_of_the_formula_from_full_logits(loss_type: str, use_weighting: bool) -> None:
    given = case()
    weights = weights_of(given) if use_weighting else [1.0] * len(LENGTHS)
    losses = [weight * FORMULAS[loss_type](row) for weight, row in zip(weights, rows_of(given), strict=True)]
    check_gradient(given, sum(losses) / len(LENGTHS), loss_types=[loss_type], use_weighting=use_weighting)


def with_targets(given: Case) -> Case:
    sums = [sequence_logprobs(column.detach(), given.batch, ld_alpha=None) for column in logprobs_of(given)]
    targets = {f"{name}_target": aot_targets(*sums, name) for name in AOT}
    return given._replace(batch=given.batch.with_sequence_columns(**targets))


def logprobs_of(given: Case) -> tuple[Tensor, Tensor]:
    return given.outputs["logprobs"], given.batch["ref_logprobs"]


@pytest.mark.parametrize("seed", range(4))
def test_aots_gradient_flows_through_both_sorted_sides(seed: int) -> None:
    given = with_targets(case(seed=seed))
    rows = rows_of(given)

    def ascending(values: list[Tensor]) -> list[Tensor]:
        return sorted(values, key=float)

    policy = ascending([row.c - row.r for row in rows])
    reference = ascending([row.ref_c - row.ref_r for row in rows])
    losses = [smoothed(BETA * (own - other)) for own, other in zip(policy, reference, strict=True)]
    check_gradient(given, sum(losses) / len(rows), loss_types=["aot"])
    chosen, rejected = (ascending([row.ratios[side] for row in rows_of(given)]) for side in (0, 1))
    losses = [smoothed(BETA * (own - other)) for own, other in zip(chosen, rejected, strict=True)]
    check_gradient(given, sum(losses) / len(rows), loss_types=["aot_unpaired"])


def test_aot_targets_by_hand() -> None:
    # differences of the policy 3, 1, 2 rank 2, 0, 1; of the reference 10, 30, 20
    logps = torch.tensor([4.0, 1.0, 2.0, 1.0, 3.0, 1.0])
    ref_logps = torch.tensor([10.0, 0.0, 30.0, 0.0, 20.0, 0.0])
    assert aot_targets(logps, ref_logps, "aot").tolist() == [30, 30, 10, 10, 20, 20]
    # r of the chosen 5, 9, 7 and of the rejected 1, 4, 2
    ratios = torch.tensor([5.0, 1.0, 9.0, 4.0, 7.0, 2.0])
    zeros = torch.zeros(6)
    assert aot_targets(ratios, zeros, "aot_unpaired").tolist() == [1, 5, 4, 9, 2, 7]
    assert aot_targets(zeros, -ratios, "aot_unpaired").tolist() == [1, 5, 4, 9, 2, 7]
    # equal values rank in their order: both chosen are 0, the rejected 8 and 6
    assert aot_targets(torch.tensor([0.0, 8.0, 0.0, 6.0]), torch.zeros(4), "aot_unpaired").tolist() == [6, 0, 8, 0]
    assert aot_targets(torch.zeros(4), torch.tensor([0.0, 8.0, 0.0, 6.0]), "aot").tolist() == [-8, -8, -6, -6]


def options_of(loss_type: str, **others: Any) -> dict[str, Any]:
    return {**BASE, "loss_types": [loss_type], "use_weighting": loss_type not in AOT, "ld_alpha": 0.5, **others}


@pytest.mark.parametrize("lengths", [((0, 3), (2, 0), (0, 0)), ((0, 0),)])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_empty_completions_give_finite_losses_and_gradients(
    loss_type: str, lengths: tuple[tuple[int, int], ...]
) -> None:
    given = with_targets(case(lengths))
    counts = counts_of([given.batch], DPO_COUNTS)
    loss, metrics = dpo_loss(given.outputs, given.batch, counts, **options_of(loss_type))
    grad = torch.autograd.grad(loss, given.logits)[0]
    assert loss.isfinite() and grad.isfinite().all()
    assert all(metric.value.isfinite() for metric in metrics.values())
    assert grad[~given.batch["loss_mask"]].abs().sum() == 0


def test_a_pair_of_the_same_answer_has_dpos_loss_at_a_tie_and_no_gradient_against_itself() -> None:
    given = case(((4, 4),))
    start, end = spans(given.batch)[0]
    twin = slice(end + 2, end + 2 + 4)
    tokens, logits = given.batch.tokens.clone(), given.logits.detach().clone()
    tokens[twin], logits[twin] = tokens[start:end], logits[start:end]
    logprobs = (logits.log_softmax(-1)[range(len(tokens)), tokens] * given.batch["loss_mask"]).requires_grad_()
    reference = (logprobs - 0.5 * given.batch["loss_mask"]).detach()
    batch = replace(given.batch, tokens=tokens, token_columns={**given.batch.token_columns, "ref_logprobs": reference})
    outputs = {"logprobs": logprobs}
    loss, metrics = dpo_loss(outputs, batch, counts_of([batch], DPO_COUNTS), loss_types=["sigmoid"], **BASE)
    loss.backward()
    assert loss.item() == pytest.approx(0.6931471805599453)
    torch.testing.assert_close(logprobs.grad[start:end], -logprobs.grad[twin])
    assert metrics["rewards/accuracies"].value == 0 and metrics["rewards/margins"].value == 0


def two_tokens() -> Batch:
    """A pair of one-token completions, the reference sure of both."""
    return Batch(
        tokens=torch.zeros(4, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32),
        num_sequences=2,
        token_columns={"loss_mask": torch.tensor([False, True] * 2), "ref_logprobs": torch.zeros(4)},
        sequence_columns={"aot_target": torch.zeros(2), "aot_unpaired_target": torch.zeros(2)},
    )


KINDS = [
    (loss_type, kind)
    for loss_type in LOSSES
    for kind in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    # the square of e^80 is past float32, here and in TRL
    if (loss_type, kind) not in (("ipo", "forward_kl"), ("ipo", "alpha_divergence"))
]


@pytest.mark.parametrize(("loss_type", "kind"), KINDS)
def test_log_ratios_of_thousands_keep_float32_finite(loss_type: str, kind: str) -> None:
    """A long completion that the policy has left: TRL's discopop gives NaN there, its forward_kl inf."""
    batch = two_tokens()
    counts = counts_of([batch], DPO_COUNTS)
    for chosen, rejected in ((-3000.0, -1.0), (-1.0, -3000.0)):
        logprobs = torch.tensor([0.0, chosen, 0.0, rejected], requires_grad=True)
        given = options_of(loss_type, f_divergence_type=kind, use_weighting=False)
        loss, _ = dpo_loss({"logprobs": logprobs}, batch, counts, **given)
        loss.backward()
        assert loss.isfinite() and logprobs.grad.isfinite().all(), (chosen, rejected)


def test_discopop_keeps_its_digits_where_its_factors_leave_float32() -> None:
    batch = two_tokens()
    logprobs = torch.tensor([0.0, -1000.0, 0.0, 0.0], requires_grad=True)
    given = {**BASE, "loss_types": ["discopop"], "discopop_tau": 0.05}
    loss, _ = dpo_loss({"logprobs": logprobs}, batch, counts_of([batch], DPO_COUNTS), **given)
    loss.backward()
    # z = -300: m = e^-6000 is 0, so what is left is -log s(-300) = 300, with slope -0.3 in log pi_c
    assert loss.item() == pytest.approx(300.0) and logprobs.grad[1].item() == pytest.approx(-0.3)


def test_divergences_are_derivatives_of_their_f() -> None:
    """f'(t) at t = e^r up to a constant: the f of f-DPO's table, differentiated by autograd."""
    ratio = torch.linspace(-2, 2, 9, dtype=torch.float64)
    t = exp(ratio).requires_grad_()
    alpha = 0.3
    functions = {
        "reverse_kl": t * log(t),
        "forward_kl": -log(t),
        "js_divergence": t * log(t) - (t + 1) * log((t + 1) / 2),
        "alpha_divergence": (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1)),
    }
    for kind, function in functions.items():
        expected = torch.autograd.grad(function.sum(), t)[0]
        scores = divergence_scores(ratio, kind, alpha=alpha)
        torch.testing.assert_close(scores.diff(), expected.diff(), msg=kind)
