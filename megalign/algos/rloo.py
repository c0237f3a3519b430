"""REINFORCE leave-one-out (RLOO, arXiv 2402.14740): advantages against the siblings of a completion, the KL
inside the reward, one ratio for a whole sequence.

N completions of the whole generation batch, neighbours in groups of G; F reward functions; T tokens and S
sequences of one packed microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalign.algos.advantages import STD_OFFSET, combined_rewards, nanstd, reward_stds, reward_summary
from megalign.algos.columns import sequence_column
from megalign.algos.kl import k1
from megalign.algos.masked import loss_column, masked, maximum, minimum, sequence_mean, token_mean
from megalign.algos.surrogates import clipped_policy_loss
from megalign.batch import Batch, Counts, Metric

# A sum over a long completion can leave the range of exp(); past e^20 no clip range tells ratios apart.
MAX_LOG_RATIO = 20.0


def sequence_kl(batch: Batch) -> Tensor:
    """[S] log(pi_old / ref) of each completion, the sum of k1 over its loss tokens.

    Columns: old_logprobs, ref_logprobs [T].
    """
    return batch.per_sequence_sum(_token_kl(batch))


def kl_metrics(batch: Batch, counts: Counts) -> dict[str, Metric]:
    """TRL's `kl`: this microbatch's share of the mean of k1 over the loss tokens that `counts` counts."""
    return {"kl": token_mean(_token_kl(batch), batch["loss_mask"], counts.tokens)}


def _token_kl(batch: Batch) -> Tensor:
    like = torch.zeros(batch.num_tokens, device=batch.tokens.device)
    return k1(loss_column(batch, "old_logprobs", like), loss_column(batch, "ref_logprobs", like))


def penalized_rewards(
    rewards: Tensor,  # [N, F]
    weights: Tensor,  # [F]
    kl: Tensor | None,  # [N], see `sequence_kl`; None without a reference
    *,
    beta: float,
    reward_clip_range: tuple[float, float] | None,
) -> Tensor:
    """[N] clip(sum of weighted rewards) - beta * KL; NaN where no function applies."""
    totals = combined_rewards(rewards, weights)
    if reward_clip_range is not None:
        totals = totals.clamp(*reward_clip_range)
    if beta == 0.0:
        return totals
    assert kl is not None, f"beta={beta} needs each completion's KL"
    return totals - beta * kl.to(totals.dtype)


def leave_one_out(totals: Tensor, num_generations: int) -> Tensor:
    """[N] -> [N], each reward less the mean of its scored siblings; NaN without any, 0 if groups are of one."""
    if num_generations == 1:  # an evaluation with one completion a prompt
        return torch.zeros_like(totals)
    groups = totals.view(-1, num_generations)
    siblings = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    baselines = (groups.nansum(dim=1, keepdim=True) - groups) / siblings
    return (groups - baselines).view(-1)


def rloo_advantages(
    rewards: Tensor,  # [N, F], NaN where a function gave None
    weights: Tensor,  # [F]
    kl: Tensor | None = None,  # [N]
    *,
    num_generations: int,
    beta: float,
    reward_clip_range: tuple[float, float] | None,
    normalize_advantages: bool,
) -> Tensor:
    """[N]: penalized reward - mean of the scored siblings' (arXiv 2402.14740), over the whole
    batch normalized if asked for; 0 for a completion that no function scored or that has no scored sibling.
    """
    totals = penalized_rewards(rewards, weights, kl, beta=beta, reward_clip_range=reward_clip_range)
    advantages = leave_one_out(totals, num_generations)
    if normalize_advantages:
        advantages = (advantages - advantages.nanmean()) / (nanstd(advantages, dim=0) + STD_OFFSET)
    return advantages.nan_to_num(nan=0.0)


def rloo_reward_metrics(
    rewards: Tensor,  # [N, F]
    weights: Tensor,  # [F]
    names: Sequence[str],
    kl: Tensor | None = None,  # [N]
    *,
    num_generations: int,
    beta: float,
    reward_clip_range: tuple[float, float] | None,
) -> dict[str, float]:
    """advantages.reward_metrics of a generation batch; frac_reward_zero_std is of the penalized rewards."""
    totals = penalized_rewards(rewards, weights, kl, beta=beta, reward_clip_range=reward_clip_range)
    return reward_summary(rewards, weights, names, reward_stds(totals, num_generations, "group"))


def rloo_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    epsilon: float,
    epsilon_high: float | None,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the mean over sequences of -min(ratio * A, clip(ratio) * A), the ratio being
    exp of the sum of the tokens' log ratios; and its share of TRL's metrics.

    `outputs`: "logprobs" [T] with its graph, "entropy" [T]. Columns: loss_mask [T], advantages [S], old_logprobs
    [T] (else the policy's own). A batch without sequences needs no columns but loss_mask and gives an exact 0
    with a graph.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    logprobs = masked(outputs["logprobs"], batch["loss_mask"])
    old_logprobs = loss_column(batch, "old_logprobs", logprobs) if "old_logprobs" in batch else logprobs.detach()
    log_ratio = batch.per_sequence_sum(logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO)
    ratio, advantages = log_ratio.exp(), sequence_column(batch, "advantages", logprobs)
    losses = clipped_policy_loss(ratio, advantages, epsilon=epsilon, epsilon_high=high)
    low = (ratio < 1 - epsilon) & (advantages < 0)
    above = (ratio > 1 + high) & (advantages > 0)
    metrics = {"entropy": token_mean(outputs["entropy"], batch["loss_mask"], counts.tokens)}
    metrics |= _clip_metrics(low.float(), above.float(), counts)
    return losses.sum() / max(counts.sequences, 1.0), metrics


def _clip_metrics(low: Tensor, high: Tensor, counts: Counts) -> dict[str, Metric]:
    """TRL's clip_ratio/*, of sequences; the extremes are over the step."""
    return {
        "clip_ratio/low_mean": sequence_mean(low, counts.sequences),
        "clip_ratio/low_min": minimum(low),
        "clip_ratio/high_mean": sequence_mean(high, counts.sequences),
        "clip_ratio/high_max": maximum(high),
        "clip_ratio/region_mean": sequence_mean(torch.maximum(low, high), counts.sequences),
    }
