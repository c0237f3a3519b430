"""Losses and ratios of policy-gradient training on sampled completions (GRPO and its relatives).

A loss is a sum already divided by the step's global counts: microbatches and ranks add up to the loss of the
whole step, whatever sequences they hold. T tokens, S sequences of one packed microbatch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megalign.algos import masked as reduce
from megalign.algos.kl import k3
from megalign.algos.masked import masked
from megalign.batch import Batch, Counts, Metric

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Level = Literal["token", "sequence"]
CorrectionMode = Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"]


def log_importance_ratio(logprobs: Tensor, old_logprobs: Tensor, batch: Batch, *, level: Level) -> Tensor:
    """[T] log(pi / pi_old) of each loss token, or of its sequence: the mean over its tokens (GSPO, arXiv
    2507.18071).
    """
    log_ratio = masked(logprobs, batch["loss_mask"]) - masked(old_logprobs, batch["loss_mask"])
    if level == "token":
        return log_ratio
    assert level == "sequence", f"importance_sampling_level={level!r}"
    return batch.per_token(reduce.sequence_token_means(log_ratio, batch))


def clipped_policy_loss(
    ratio: Tensor,  # [T]
    advantages: Tensor,  # [T]
    *,
    epsilon: float,
    epsilon_high: float,
) -> Tensor:
    """[T] -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) (PPO, arXiv 1707.06347 eq. 7)."""
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.min(ratio * advantages, clipped * advantages)


def aggregated(
    token_losses: Tensor,  # [T]
    batch: Batch,
    counts: Counts,
    *,
    loss_type: LossType,
    max_completion_length: int,
) -> Tensor:
    """This microbatch's share of the step's loss; a sequence without loss tokens still counts as a
    sequence.

    grpo: mean over sequences of each one's token mean; bnpo: mean over the step's tokens; dr_grpo: sum over
    (sequences * max_completion_length), arXiv 2503.20783; dapo: mean over the generation batch's tokens, a
    step's share.
    """
    if loss_type == "grpo":
        return reduce.sequence_token_means(token_losses, batch).sum() / max(counts.sequences, 1.0)
    denominators = {
        "bnpo": counts.tokens,
        "dr_grpo": counts.sequences * max_completion_length,
        "dapo": counts.generation_tokens,
    }
    assert loss_type in denominators, f"loss_type={loss_type!r}"
    denominator = denominators[loss_type]
    assert denominator == denominator, f"{loss_type} needs counts.generation_tokens"
    return masked(token_losses, batch["loss_mask"]).sum() / max(denominator, 1.0)


def grpo_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    beta: float,
    epsilon: float,
    epsilon_high: float | None,
    loss_type: LossType,
    importance_sampling_level: Level,
    max_completion_length: int,
    use_bias_correction_kl: bool = True,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the clipped policy loss + beta * KL, and its share of TRL's metrics.

    `outputs`: "logprobs" [T] with its graph, "entropy" [T]. Columns: loss_mask [T], advantages [S];
    optional are old_logprobs [T] (else the policy's own: the first update on fresh samples),
    importance_weights [T] (see `rollout_importance_weights`); ref_logprobs [T] when beta != 0.
    `use_bias_correction_kl` weights the KL by the importance ratio, its gradient included (DeepSeek-V3.2,
    arXiv 2512.02556). A batch without sequences needs no columns but loss_mask and gives an exact 0 with a
    graph.
    """
    mask, logprobs = batch["loss_mask"], outputs["logprobs"]
    high = epsilon if epsilon_high is None else epsilon_high
    old_logprobs = batch["old_logprobs"] if "old_logprobs" in batch else logprobs.detach()
    ratio = log_importance_ratio(logprobs, old_logprobs, batch, level=importance_sampling_level).exp()
    advantages = batch.per_token(_advantages(batch, logprobs))

    losses = clipped_policy_loss(ratio, advantages, epsilon=epsilon, epsilon_high=high)
    if "importance_weights" in batch:
        losses = losses * batch["importance_weights"]

    metrics = {"entropy": reduce.token_mean(outputs["entropy"], mask, counts.tokens)}
    if beta != 0.0:
        kl = _reference_kl(logprobs, batch) * (ratio if use_bias_correction_kl else 1.0)
        losses = losses + beta * kl
        metrics["kl"] = reduce.token_mean(kl, mask, counts.tokens)

    low_clipped = (ratio < 1 - epsilon) & (advantages < 0)
    high_clipped = (ratio > 1 + high) & (advantages > 0)
    metrics |= clip_metrics(low_clipped, high_clipped, batch, counts, level=importance_sampling_level)
    loss = aggregated(losses, batch, counts, loss_type=loss_type, max_completion_length=max_completion_length)
    return loss, metrics


def _advantages(batch: Batch, like: Tensor) -> Tensor:
    if batch.num_sequences == 0 and "advantages" not in batch:  # Batch.dummy
        return like.new_zeros(0)
    return batch["advantages"].to(like.dtype)


def _reference_kl(logprobs: Tensor, batch: Batch) -> Tensor:
    mask = batch["loss_mask"]
    reference = batch["ref_logprobs"] if batch.num_sequences or "ref_logprobs" in batch else logprobs.detach()
    return k3(masked(logprobs, mask), masked(reference, mask))


def clip_metrics(
    low_clipped: Tensor,  # [T] bool
    high_clipped: Tensor,  # [T] bool
    batch: Batch,
    counts: Counts,
    *,
    level: Level,
) -> dict[str, Metric]:
    """TRL's clip_ratio/*: means over loss tokens, or over sequences where the ratio is a sequence's.

    low_min and high_max are over all sequences of the step that have loss tokens, so they do not depend on
    the layout (TRL takes them over the sequences of each microbatch, then averages over microbatches).
    """
    mask = batch["loss_mask"]
    has_tokens = batch.per_sequence_sum(mask.float()) > 0
    metrics = {}
    shares = {}
    for name, clipped in (
        ("low", low_clipped),
        ("high", high_clipped),
        ("region", low_clipped | high_clipped),
    ):
        values = clipped.float()
        shares[name] = reduce.sequence_token_means(values, batch)
        # At the sequence level every token of a sequence carries the same value, so its mean is that value.
        mean = (
            reduce.token_mean(values, mask, counts.tokens)
            if level == "token"
            else reduce.sequence_mean(shares[name], counts.sequences)
        )
        metrics[f"clip_ratio/{name}_mean"] = mean
    metrics["clip_ratio/low_min"] = reduce.minimum(shares["low"][has_tokens])
    metrics["clip_ratio/high_max"] = reduce.maximum(shares["high"][has_tokens])
    return metrics


def rollout_importance_weights(
    batch: Batch,
    *,
    mode: CorrectionMode,
    clip_max: float | None,
    clip_min: float | None = None,
) -> Tensor:
    """[T] pi_old / pi_sampler of each loss token or, in the sequence modes, the product over its sequence's
    tokens.

    Columns: loss_mask, old_logprobs, rollout_logprobs [T]. `*_truncate` clamps the ratio to [clip_min,
    clip_max], `*_mask` makes it 0 outside. A token whose sampler logprob is NaN (unknown) counts as ratio
    1. Tokens that are not in the loss have weight 1 in the token modes, their sequence's in the sequence
    modes, 0 on the dummy tail.
    """
    ratios = _ratios(batch, mode, clip_max=clip_max, clip_min=clip_min)
    return batch.per_token(ratios) if mode.startswith("sequence") else ratios


def _ratios(batch: Batch, mode: CorrectionMode, *, clip_max: float | None, clip_min: float | None) -> Tensor:
    """[S] in the sequence modes, [T] in the token modes."""
    assert mode in ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"), mode
    log_ratio = masked(_sampler_difference(batch).nan_to_num(nan=0.0), batch["loss_mask"])
    if mode.startswith("sequence"):
        log_ratio = batch.per_sequence_sum(log_ratio)
    ratio = log_ratio.exp()
    low = -math.inf if clip_min is None else clip_min
    high = math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def _sampler_difference(batch: Batch) -> Tensor:
    if batch.num_sequences == 0:  # Batch.dummy has no columns
        return torch.zeros(batch.num_tokens, device=batch.tokens.device)
    return batch["old_logprobs"] - batch["rollout_logprobs"]


def sampling_metrics(
    batch: Batch,
    counts: Counts,
    *,
    mode: CorrectionMode,
    clip_max: float | None,
    clip_min: float | None = None,
    scored_tokens: float | None = None,
) -> dict[str, Metric]:
    """TRL's sampling/*: |old - sampler logprob| over loss tokens, and the corrected ratios.

    `counts` are those of the whole generation batch; `scored_tokens` is the global count of loss tokens
    with a sampler logprob, where some have none (NaN). Extremes are over the job, and neutral (+-inf) where
    nothing counts.
    """
    mask = batch["loss_mask"]
    difference = _sampler_difference(batch).abs()
    scored = mask & ~difference.isnan()
    num_scored = counts.tokens if scored_tokens is None else scored_tokens
    ratios = _ratios(batch, mode, clip_max=clip_max, clip_min=clip_min)
    if mode.startswith("sequence"):
        mean = reduce.sequence_mean(ratios, counts.sequences)
    else:
        mean = reduce.token_mean(ratios, mask, counts.tokens)
        ratios = ratios[mask]
    return {
        "sampling/sampling_logp_difference/mean": reduce.token_mean(difference, scored, num_scored),
        "sampling/sampling_logp_difference/max": reduce.maximum(difference[scored]),
        "sampling/importance_sampling_ratio/min": reduce.minimum(ratios),
        "sampling/importance_sampling_ratio/mean": mean,
        "sampling/importance_sampling_ratio/max": reduce.maximum(ratios),
    }
