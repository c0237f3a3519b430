"""PPO on sampled completions (arXiv 1707.06347, with language models 1909.08593): rewards of tokens, the losses
of policy and critic.

TRL 1.12's formulas over all loss tokens of the step: padding is in no mean, and rewards, values and logprobs
share one mask. T tokens, S sequences of one packed microbatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.algos.masked import loss_column, masked, sequence_mean, token_mean
from megalign.algos.surrogates import clipped_policy_loss
from megalign.batch import Batch, Counts, Metric


def with_missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float | None) -> Tensor:
    """[S] scores, less the penalty where the completion did not end by itself (`ended` [S] bool is False)."""
    return scores if penalty is None else torch.where(ended, scores, scores - penalty)


def token_rewards(kl: Tensor, scores: Tensor, batch: Batch, *, kl_coef: float) -> Tensor:
    """[T], [S] -> [T] -kl_coef * KL on each loss token, and the score on the last of its sequence.

    A completion without loss tokens has no place for a score and may have none (NaN); another must have one.
    """
    rewards = masked(-kl_coef * kl, batch["loss_mask"])
    last = _last_loss_tokens(batch)
    placed = last >= 0
    assert scores[placed].isfinite().all(), (
        f"scores {scores.tolist()}: one of a completion with loss tokens is not finite; mask what has no score"
    )
    return rewards.index_add(0, last[placed], scores[placed].to(rewards.dtype))


def _last_loss_tokens(batch: Batch) -> Tensor:
    """[S] index of each sequence's last loss token, -1 where it has none."""
    indices = torch.arange(batch.num_tokens, device=batch.tokens.device)
    indices = indices.masked_fill(~batch["loss_mask"], -1)
    last = indices.new_full((batch.num_sequences + 1,), -1)
    return last.scatter_reduce(0, batch.sequence_ids, indices, "amax")[: batch.num_sequences]


def objective_metrics(kl: Tensor, batch: Batch, counts: Counts, *, kl_coef: float) -> dict[str, Metric]:
    """TRL's objective/{kl,entropy,non_score_reward}: sums over a completion's loss tokens, then this microbatch's
    share of the mean over the sequences that `counts` counts.

    `kl` [T]; column old_logprobs [T], whose negative sum is the entropy estimated from the samples.
    """
    sums = batch.per_sequence_sum(masked(kl, batch["loss_mask"]))
    surprise = batch.per_sequence_sum(-loss_column(batch, "old_logprobs", kl))
    return {
        "objective/kl": sequence_mean(sums, counts.sequences),
        "objective/entropy": sequence_mean(surprise, counts.sequences),
        "objective/non_score_reward": sequence_mean(-kl_coef * sums, counts.sequences),
    }


def ppo_policy_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    cliprange: float,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the mean over loss tokens of max(-A * ratio, -A * clip(ratio, 1 +- cliprange))
    (arXiv 1707.06347 eq. 7), and its share of TRL's metrics.

    `outputs`: "logprobs" [T] with its graph, "entropy" [T]. Columns: loss_mask, old_logprobs, advantages [T].
    val/ratio_var is the mean over the step's loss tokens of
    (ratio - 1)^2: 1 is the mean that a ratio has under the policy that sampled. (TRL: the variance of
    microbatches' means.) A batch without sequences needs no columns but loss_mask and gives an exact 0 with a
    graph.
    """
    mask = batch["loss_mask"]
    logprobs = masked(outputs["logprobs"], mask)
    log_ratio = logprobs - loss_column(batch, "old_logprobs", logprobs)
    ratio, advantages = log_ratio.exp(), loss_column(batch, "advantages", logprobs)
    losses = clipped_policy_loss(ratio, advantages, epsilon=cliprange, epsilon_high=cliprange)
    clipped = losses > -ratio * advantages
    loss = masked(losses, mask).sum() / max(counts.tokens, 1.0)
    columns = {
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        "policy/clipfrac_avg": clipped.float(),
        "policy/entropy_avg": outputs["entropy"],
        "val/ratio": ratio,
        "val/ratio_var": (ratio - 1).square(),
    }
    metrics = {name: token_mean(column, mask, counts.tokens) for name, column in columns.items()}
    return loss, {"loss/policy_avg": Metric(loss.detach()), **metrics}


def ppo_value_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    cliprange_value: float,
    vf_coef: float,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of vf_coef / 2 * the mean over loss tokens of max((V - R)^2, (V_clipped - R)^2),
    V_clipped being within cliprange_value of the values at sampling; metrics as TRL's, without vf_coef.

    `outputs`: "values" [T] with its graph. Columns: loss_mask, values (at sampling), returns [T]. A batch
    without sequences needs no columns but loss_mask and gives an exact 0 with a graph.
    """
    mask = batch["loss_mask"]
    values = masked(outputs["values"], mask)
    old_values, returns = loss_column(batch, "values", values), loss_column(batch, "returns", values)
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    errors, clipped_errors = (values - returns).square(), (clipped - returns).square()
    mean = 0.5 * torch.max(errors, clipped_errors).sum() / max(counts.tokens, 1.0)
    metrics = {
        "loss/value_avg": Metric(mean.detach()),
        "val/clipfrac_avg": token_mean((clipped_errors > errors).float(), mask, counts.tokens),
    }
    return vf_coef * mean, metrics
