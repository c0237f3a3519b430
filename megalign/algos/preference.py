"""DPO (arXiv 2305.18290) over packed preference pairs: the loss types of `dpo_losses`, weighted and added up.

T tokens, S sequences, P = S / 2 pairs of one microbatch. A loss is a sum over pairs already divided by the step's
global counts; what couples pairs (AOT's ranks) is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megalign.algos.columns import sequence_column, token_column
from megalign.algos.dpo_losses import LOSSES, AOTLossType, FDivergence, PairTerms, divergence_scores
from megalign.algos.masked import masked, sequence_token_means, token_mean
from megalign.algos.pairs import (
    Pair,
    chosen_mask,
    chosen_tokens,
    logps_metrics,
    num_pairs,
    rejected_mask,
    rejected_tokens,
    reward_metrics,
)
from megalign.batch import Batch, Counts, Metric

DPO_COUNTS: Mapping[str, Callable[[Batch], Tensor]] = {
    "chosen_tokens": chosen_tokens,
    "rejected_tokens": rejected_tokens,
}


def dpo_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    loss_types: Sequence[str],
    loss_weights: Sequence[float] | None,
    beta: float,
    label_smoothing: float,
    f_divergence_type: FDivergence,
    f_alpha_divergence_coef: float,
    ld_alpha: float | None,
    use_weighting: bool,
    discopop_tau: float,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the weighted sum of DPO losses (weights None: 1 each), and of TRL's metrics.

    `outputs`: logprobs [T] with its graph; entropy, argmax_correct and mean_logits [T], each for its metric where
    the engine gives it; log_sum_squares [T] for `use_weighting`. Columns: loss_mask (completion tokens),
    ref_logprobs [T]; aot_target and aot_unpaired_target [S] for the loss types of that name. Counts: DPO_COUNTS.
    """
    logps = sequence_logprobs(outputs["logprobs"], batch, ld_alpha=ld_alpha)
    reference = token_column(batch, "ref_logprobs", outputs["logprobs"])
    logratios = logps - sequence_logprobs(reference, batch, ld_alpha=ld_alpha)
    pairs = PairTerms(
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        logps=Pair.of(logps),
        logratios=Pair.of(logratios),
        scores=Pair.of(divergence_scores(logratios, f_divergence_type, alpha=f_alpha_divergence_coef)),
        lengths=Pair.of(batch.per_sequence_sum(batch["loss_mask"].to(logps.dtype))),
        chosen_nll=_chosen_nll(outputs["logprobs"], batch, counts),
        aot=_targets("aot", loss_types, batch, logps),
        aot_unpaired=_targets("aot_unpaired", loss_types, batch, logps),
    )
    weights = loss_weights or [1.0] * len(loss_types)
    losses = sum(weight * LOSSES[name](pairs) for name, weight in zip(loss_types, weights, strict=True))
    if use_weighting:
        assert not {"aot", "aot_unpaired"} & set(loss_types), "WPO weighs pairs, and AOT takes them apart"
        losses = losses * wpo_weights(outputs, batch)
    metrics = reward_metrics(pairs.rewards, counts) | logps_metrics(pairs.logps, counts)
    loss = (losses.sum() / num_pairs(counts)).to(outputs["logprobs"].dtype)
    return loss, metrics | _token_metrics(outputs, batch, counts)


def sequence_logprobs(logprobs: Tensor, batch: Batch, *, ld_alpha: float | None) -> Tensor:
    """[T] -> [S] float64, the log probability of each completion; differentiable.

    Of a long answer it is thousands, of which fp32 keeps ten-thousandths, and losses are of differences below 1.
    With `ld_alpha` the tokens past the length of the pair's shorter completion count ld_alpha (LD-DPO, arXiv
    2409.06411).
    """
    logprobs = masked(logprobs, batch["loss_mask"])
    if ld_alpha is not None:
        logprobs = torch.where(_in_shared_length(batch), logprobs, ld_alpha * logprobs)
    return batch.per_sequence_sum(logprobs.double())


def _in_shared_length(batch: Batch) -> Tensor:
    """[T] bool: of a completion's tokens, the first min(|chosen|, |rejected|)."""
    counted = batch["loss_mask"].long()
    shared = torch.minimum(*Pair.of(batch.per_sequence_sum(counted))).repeat_interleave(2)
    so_far = counted.cumsum(0)
    before = (so_far - counted)[batch.cu_seqlens[: batch.num_sequences].long()]  # [S] in earlier sequences
    return so_far - batch.per_token(before) <= batch.per_token(shared)


def wpo_weights(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """[P] how much the policy itself would write both completions: the product of exp(mean over tokens of
    log p - log sum_v p_v^2), a constant (WPO, arXiv 2406.11827 eq. 2).
    """
    aligned = (outputs["logprobs"] - outputs["log_sum_squares"]).detach()
    weights = Pair.of(sequence_token_means(aligned, batch).exp())
    return weights.chosen * weights.rejected


def aot_targets(logps: Tensor, ref_logps: Tensor, loss_type: AOTLossType) -> Tensor:
    """[S], [S] -> [S]: what each sequence of the GLOBAL batch is compared with, for the column <loss_type>_target.

    Arguments are `sequence_logprobs` of policy and reference, all the step's pairs in order. aot: the reference's
    chosen - rejected that has the rank which the policy's has for this pair, on both its sequences. aot_unpaired: for
    a chosen sequence the log(policy / reference) of the rejected one of equal rank, and the other way round. Equal
    values rank in their order in the batch.
    """
    if loss_type == "aot":
        return _of_equal_rank(Pair.of(logps).delta, Pair.of(ref_logps).delta).repeat_interleave(2)
    assert loss_type == "aot_unpaired", f"loss_type={loss_type!r}"
    chosen, rejected = Pair.of(logps - ref_logps)
    sides = [_of_equal_rank(chosen, rejected), _of_equal_rank(rejected, chosen)]
    return torch.stack(sides, dim=1).flatten()


def _of_equal_rank(values: Tensor, others: Tensor) -> Tensor:
    """[P], [P] -> [P]: for each value, the one of `others` that has its rank."""
    order = values.argsort(stable=True)
    return torch.empty_like(others).index_copy(0, order, others.sort().values)


def _chosen_nll(logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
    """[P]; divided by the step's pairs and added up it is the mean over the step's chosen tokens."""
    sums = batch.per_sequence_sum(masked(logprobs, batch["loss_mask"]))
    return -Pair.of(sums).chosen * (num_pairs(counts) / max(counts["chosen_tokens"], 1.0))


def _targets(loss_type: str, loss_types: Sequence[str], batch: Batch, like: Tensor) -> Pair | None:
    if loss_type not in loss_types:
        return None
    return Pair.of(sequence_column(batch, f"{loss_type}_target", like))


def _token_metrics(outputs: dict[str, Tensor], batch: Batch, counts: Counts) -> dict[str, Metric]:
    """Means over completion tokens: of both kinds, or of the one that the name says (accuracy: the chosen)."""
    chosen, rejected = chosen_mask(batch), rejected_mask(batch)
    metrics = {}
    if "entropy" in outputs:
        metrics["entropy"] = token_mean(outputs["entropy"], batch["loss_mask"], counts.tokens)
    if "argmax_correct" in outputs:
        metrics["mean_token_accuracy"] = token_mean(outputs["argmax_correct"], chosen, counts["chosen_tokens"])
    if "mean_logits" in outputs:
        metrics["logits/chosen"] = token_mean(outputs["mean_logits"], chosen, counts["chosen_tokens"])
        metrics["logits/rejected"] = token_mean(outputs["mean_logits"], rejected, counts["rejected_tokens"])
    return metrics
