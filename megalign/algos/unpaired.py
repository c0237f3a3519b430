"""KTO: answers that are good or bad each by itself, without pairs (arXiv 2402.01306).

T tokens, S sequences of one microbatch. A loss is a sum over sequences already divided by the step's global count;
what couples them, the KL estimate z, is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megalign.algos.columns import sequence_column, token_column
from megalign.algos.masked import masked, sequence_mean, token_mean
from megalign.batch import Batch, Counts, Metric

KTOLossType = Literal["kto", "apo_zero_unpaired"]


def kto_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    loss_type: KTOLossType,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the weighted mean of 1 - v over sequences (eq. 7), and of TRL's metrics.

    `outputs`: logprobs [T] with its graph; entropy and mean_logits [T], each for its metric where the engine gives
    it. Columns: loss_mask (completion tokens), ref_logprobs [T], desirable [S] (1.0 or 0.0), and for loss type kto
    kl [S]: z >= 0, the same for the whole step, KL(policy || reference) estimated from mismatched completions of the
    global batch. Counts: KTO_COUNTS. A step without desirable or without undesirable sequences has no metrics of that
    kind, and no margin, on any rank.
    """
    ratios = masked(outputs["logprobs"] - token_column(batch, "ref_logprobs", outputs["logprobs"]), batch["loss_mask"])
    rewards = beta * batch.per_sequence_sum(ratios)
    desirable = _desirable(batch)
    kl = _kl(batch, rewards, loss_type)
    relative = rewards - beta * kl
    # 1 - s(x) is s(-x), which keeps its digits where it is small.
    losses = torch.where(
        desirable,
        desirable_weight * (-relative).sigmoid(),
        undesirable_weight * relative.sigmoid(),
    )
    metrics = {"kl": sequence_mean(kl, counts.sequences)}
    if "entropy" in outputs:
        metrics["entropy"] = token_mean(outputs["entropy"], batch["loss_mask"], counts.tokens)
    metrics |= _kind_metrics(outputs, batch, counts, rewards)
    return losses.sum() / max(counts.sequences, 1.0), metrics


class WeightRanges(NamedTuple):
    """The two ways to balance the kinds: one of the two weights into its range, the other left as it is."""

    desirable: tuple[float, float]
    undesirable: tuple[float, float]


def recommended_weights(
    num_desirable: int,
    num_undesirable: int,
    *,
    desirable_weight: float,
    undesirable_weight: float,
) -> WeightRanges | None:
    """Ranges in which (desirable_weight * desirables) / (undesirable_weight * undesirables) is from 1 to 1.33 (eq. 8),
    rounded to 2 digits; None where the weights need no advice: equal numbers, or one of them already in its range.
    """
    good, bad = max(num_desirable, 1), max(num_undesirable, 1)
    if good == bad:
        return None
    balanced_desirable = undesirable_weight * bad / good
    balanced_undesirable = desirable_weight * good / bad
    ranges = WeightRanges(
        desirable=(round(balanced_desirable, 2), round(1.33 * balanced_desirable, 2)),
        undesirable=(round(balanced_undesirable / 1.33, 2), round(balanced_undesirable, 2)),
    )
    weights = (desirable_weight, undesirable_weight)
    if any(low <= weight <= high for weight, (low, high) in zip(weights, ranges, strict=True)):
        return None
    return ranges


def _kl(batch: Batch, rewards: Tensor, loss_type: KTOLossType) -> Tensor:
    """[S]; apo_zero_unpaired has none (APO, arXiv 2408.06266 eq. 7)."""
    if loss_type == "apo_zero_unpaired":
        return torch.zeros_like(rewards)
    assert loss_type == "kto", f"loss_type={loss_type!r}"
    return sequence_column(batch, "kl", rewards)


def _kind_metrics(outputs: dict[str, Tensor], batch: Batch, counts: Counts, rewards: Tensor) -> dict[str, Metric]:
    """TRL's rewards/*, logps/* and logits/*: means over one kind's sequences or completion tokens."""
    logps = batch.per_sequence_sum(masked(outputs["logprobs"], batch["loss_mask"]))
    kinds = (("chosen", "desirable", _desirable(batch)), ("rejected", "undesirable", _undesirable(batch)))
    metrics = {}
    for name, kind, is_kind in kinds:
        if counts[kind] > 0:
            metrics[f"rewards/{name}"] = sequence_mean(masked(rewards, is_kind), counts[kind])
            metrics[f"logps/{name}"] = sequence_mean(masked(logps, is_kind), counts[kind])
        if counts[f"{kind}_tokens"] > 0 and "mean_logits" in outputs:
            tokens = batch.per_token(is_kind) & batch["loss_mask"]
            metrics[f"logits/{name}"] = token_mean(outputs["mean_logits"], tokens, counts[f"{kind}_tokens"])
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics["rewards/margins"] = Metric(metrics["rewards/chosen"].value - metrics["rewards/rejected"].value)
    return metrics


def _desirable(batch: Batch) -> Tensor:
    """[S] bool."""
    return sequence_column(batch, "desirable", batch["loss_mask"])


def _undesirable(batch: Batch) -> Tensor:
    """[S] bool."""
    return ~_desirable(batch)


def _count(kind: Callable[[Batch], Tensor], *, of_tokens: bool) -> Callable[[Batch], Tensor]:
    if of_tokens:
        return lambda batch: (batch.per_token(kind(batch)) & batch["loss_mask"]).sum()
    return lambda batch: kind(batch).sum()


KTO_COUNTS: Mapping[str, Callable[[Batch], Tensor]] = {
    "desirable": _count(_desirable, of_tokens=False),
    "undesirable": _count(_undesirable, of_tokens=False),
    "desirable_tokens": _count(_desirable, of_tokens=True),
    "undesirable_tokens": _count(_undesirable, of_tokens=True),
}
