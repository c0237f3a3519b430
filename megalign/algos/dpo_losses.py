"""DPO's 15 loss types: [P] losses of P preference pairs, from what `preference.dpo_loss` found out about them.

Notation: r = log(policy / reference), the sum over a completion's tokens; c and r mark chosen and rejected;
delta = score_c - score_r, where score is r or its f-divergence form; s is the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from megalign.algos.pairs import Pair

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
AOTLossType = Literal["aot", "aot_unpaired"]

MAX_EXPONENT = 80.0  # TRL's for float32: e^80 is still finite


@dataclass(frozen=True, kw_only=True)
class PairTerms:
    """What the loss types read, [P] each."""

    beta: float
    label_smoothing: float
    discopop_tau: float
    logps: Pair  # the policy's
    logratios: Pair  # r
    scores: Pair  # r through the f-divergence
    lengths: Pair  # completion tokens
    chosen_nll: Tensor  # a pair's part of the chosen tokens' mean, times the step's pairs
    aot: Pair | None  # `preference.aot_targets` of either kind, where that loss type is asked for
    aot_unpaired: Pair | None

    @property
    def logit(self) -> Tensor:
        """beta * delta."""
        return self.beta * self.scores.delta

    @property
    def mean_delta(self) -> Tensor:
        """delta of the scores per completion token."""
        chosen, rejected = (
            score / length.clamp(min=1.0) for score, length in zip(self.scores, self.lengths, strict=True)
        )
        return chosen - rejected

    @property
    def rewards(self) -> Pair:
        """beta * r."""
        return Pair(self.beta * self.logratios.chosen, self.beta * self.logratios.rejected)


def divergence_scores(logratios: Tensor, kind: FDivergence, *, alpha: float) -> Tensor:
    """f'(e^r) of each log ratio r, [S] -> [S] (f-DPO, arXiv 2309.16240), up to constants that cancel.

    The exponent of the alpha divergence is clamped as in TRL. forward_kl, its case alpha = 0, is clamped too: TRL's
    overflows once a sequence's log ratio is below -88.
    """
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1.0) < 1e-6):
        return logratios
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(logratios)
    assert kind in ("forward_kl", "alpha_divergence"), f"f_divergence_type={kind!r}"
    power = (alpha if kind == "alpha_divergence" else 0.0) - 1.0
    return ((power * logratios).clamp(max=MAX_EXPONENT).exp() - 1.0) / power


def sigmoid(pairs: PairTerms) -> Tensor:
    """-log s(beta delta) (DPO, arXiv 2305.18290 eq. 7)."""
    return -logsigmoid(pairs.logit)


def sigmoid_norm(pairs: PairTerms) -> Tensor:
    """The same of scores per token (Tulu 3, arXiv 2411.15124)."""
    return -logsigmoid(pairs.beta * pairs.mean_delta)


def hinge(pairs: PairTerms) -> Tensor:
    """max(0, 1 - beta delta) (SLiC's loss against a reference: RSO, arXiv 2309.06657)."""
    return (1 - pairs.logit).relu()


def ipo(pairs: PairTerms) -> Tensor:
    """(delta - 1 / (2 beta))^2 of scores per token, as its authors use it (IPO, arXiv 2310.12036 eq. 17)."""
    return (pairs.mean_delta - 1 / (2 * pairs.beta)).square()


def exo_pair(pairs: PairTerms) -> Tensor:
    """KL((s(beta delta), s(-beta delta)) || (1 - epsilon, epsilon)) (EXO, arXiv 2402.00856 eq. 16).

    `label_smoothing` is epsilon and must be above 0.
    """
    epsilon, logit = pairs.label_smoothing, pairs.logit
    assert 0.0 < epsilon < 1.0, f"exo_pair needs label_smoothing in (0, 1), not {epsilon}"
    won = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-epsilon))
    lost = (-logit).sigmoid() * (logsigmoid(-logit) - math.log(epsilon))
    return won + lost


def nca_pair(pairs: PairTerms) -> Tensor:
    """-log s(beta r_c) - (log s(-beta r_c) + log s(-beta r_r)) / 2 (NCA, arXiv 2402.05369)."""
    chosen, rejected = pairs.rewards
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def robust(pairs: PairTerms) -> Tensor:
    """DPO's loss made unbiased where labels are flipped with probability epsilon (arXiv 2403.00409)."""
    epsilon, logit = pairs.label_smoothing, pairs.logit
    return (epsilon * logsigmoid(-logit) - (1 - epsilon) * logsigmoid(logit)) / (1 - 2 * epsilon)


def bco_pair(pairs: PairTerms) -> Tensor:
    """-log s(beta r_c) - log s(-beta r_r), BCO without the running shift, as in TRL (arXiv 2404.04656)."""
    chosen, rejected = pairs.rewards
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pairs: PairTerms) -> Tensor:
    """(r_c - 1 / (2 beta))^2 + (r_r + 1 / (2 beta))^2: the winner wins for sure (SPPO, arXiv 2405.00675 eq. 4.7)."""
    chosen, rejected = pairs.logratios
    return (chosen - 0.5 / pairs.beta).square() + (rejected + 0.5 / pairs.beta).square()


def apo_zero(pairs: PairTerms) -> Tensor:
    """1 - s(beta r_c) + s(beta r_r) (APO, arXiv 2408.06266 eq. 7)."""
    chosen, rejected = pairs.rewards
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(pairs: PairTerms) -> Tensor:
    """s(beta r_c) + 1 - s(beta (r_c - r_r)) (APO, arXiv 2408.06266 eq. 8)."""
    chosen, rejected = pairs.rewards
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def discopop(pairs: PairTerms) -> Tensor:
    """(1 - m) * -log s(z) + m * e^-z with z = beta delta, m = s(z / tau) (DiscoPOP, arXiv 2406.08414 eq. 5).

    m * e^-z is one exponential: at z < -88 it is 0, and its factors 0 and inf.
    """
    logit, tau = pairs.logit, pairs.discopop_tau
    exponential = (logsigmoid(logit / tau) - logit).exp()
    return (-logit / tau).sigmoid() * -logsigmoid(logit) + exponential


def sft(pairs: PairTerms) -> Tensor:
    """Negative log likelihood of the chosen completions; a mean over the step's chosen tokens, not over pairs."""
    return pairs.chosen_nll


def aot(pairs: PairTerms) -> Tensor:
    """Smoothed -log s(beta d), d = a pair's log(policy_c / policy_r) minus the reference's of equal rank
    (AOT, arXiv 2406.05882).
    """
    assert pairs.aot is not None, "aot needs the column aot_target"
    return _smoothed(pairs.logps.delta - pairs.aot.chosen, pairs)


def aot_unpaired(pairs: PairTerms) -> Tensor:
    """Smoothed -log s(beta d), d = r of a chosen sequence minus r of the rejected one of equal rank (arXiv 2406.05882).

    The counterpart is a constant here, so the rejected sequence's part has its gradient, and the value 0: the chosen
    one that it is compared with has told it already.
    """
    assert pairs.aot_unpaired is not None, "aot_unpaired needs the column aot_unpaired_target"
    chosen = _smoothed(pairs.logratios.chosen - pairs.aot_unpaired.chosen, pairs)
    rejected = _smoothed(pairs.aot_unpaired.rejected - pairs.logratios.rejected, pairs)
    return chosen + (rejected - rejected.detach())


def _smoothed(difference: Tensor, pairs: PairTerms) -> Tensor:
    logit, epsilon = pairs.beta * difference, pairs.label_smoothing
    return -(1 - epsilon) * logsigmoid(logit) - epsilon * logsigmoid(-logit)


LOSSES: Mapping[str, Callable[[PairTerms], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
}
