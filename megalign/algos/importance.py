"""The sampler is not quite the policy: ratios that correct for it, and the mask of sequences too far from it.

T tokens, S sequences of one packed microbatch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megalign.algos.masked import loss_column, masked, maximum, minimum, sequence_mean, sequence_token_means, token_mean
from megalign.batch import Batch, Counts, Metric

CorrectionMode = Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"]


def off_policy_mask(logprobs: Tensor, advantages: Tensor, batch: Batch, *, threshold: float) -> Tensor:
    """[T], [S] -> [S] bool: False for a sequence with A < 0 whose mean of log(pi_sampler / pi) over its loss
    tokens exceeds the threshold (DeepSeek-V3.2, arXiv 2512.02556 eq. 9).

    Columns: rollout_logprobs [T], else old_logprobs, else the policy is the sampler. A token whose sampler
    logprob is NaN (unknown) says nothing against its sequence.
    """
    name = "rollout_logprobs" if "rollout_logprobs" in batch else "old_logprobs"
    logprobs = logprobs.detach()
    sampler = loss_column(batch, name, logprobs) if name in batch else logprobs
    divergence = sequence_token_means((sampler - logprobs).nan_to_num(nan=0.0), batch)
    return (advantages >= 0) | (divergence <= threshold)


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


def _scored(batch: Batch) -> Tensor:
    """[T] the loss tokens with a sampler logprob; vLLM gives NaN for those that it could not score."""
    return batch["loss_mask"] & ~batch["rollout_logprobs"].isnan() if batch.num_sequences else batch["loss_mask"]


# Taken as zeros, tokens without a score would understate the difference.
SAMPLING_COUNTS = {"scored_tokens": lambda batch: _scored(batch).sum()}


def sampling_metrics(
    batch: Batch,
    counts: Counts,
    *,
    mode: CorrectionMode,
    clip_max: float | None,
    clip_min: float | None = None,
) -> dict[str, Metric]:
    """TRL's sampling/*: |old - sampler logprob| over loss tokens, and the corrected ratios.

    `counts` are those of the whole generation batch, SAMPLING_COUNTS among them. Extremes are over the job, and
    neutral (+-inf) where nothing counts.
    """
    mask = batch["loss_mask"]
    difference = _sampler_difference(batch).abs()
    scored = _scored(batch)
    ratios = _ratios(batch, mode, clip_max=clip_max, clip_min=clip_min)
    if mode.startswith("sequence"):
        mean = sequence_mean(ratios, counts.sequences)
    else:
        mean = token_mean(ratios, mask, counts.tokens)
        ratios = ratios[mask]
    return {
        "sampling/sampling_logp_difference/mean": token_mean(difference, scored, counts["scored_tokens"]),
        "sampling/sampling_logp_difference/max": maximum(difference[scored]),
        "sampling/importance_sampling_ratio/min": minimum(ratios),
        "sampling/importance_sampling_ratio/mean": mean,
        "sampling/importance_sampling_ratio/max": maximum(ratios),
    }
