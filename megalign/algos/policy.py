"""GRPO's losses and their relatives: which ratio, which mask, which denominator.

A loss is a sum already divided by the step's global counts: microbatches and ranks add up to the loss of the
whole step, whatever sequences they hold. T tokens, S sequences of one packed microbatch. What one token adds
is in surrogates.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megalign.algos.columns import sequence_column
from megalign.algos.entropy import bonus_mask, entropy_bonus
from megalign.algos.importance import off_policy_mask
from megalign.algos.kl import k3
from megalign.algos.masked import loss_column, masked, maximum, minimum, sequence_mean, sequence_token_means, token_mean
from megalign.algos.surrogates import cispo_loss, clipped_policy_loss, sapo_loss, vespo_weights
from megalign.batch import Batch, Counts, Metric

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Level = Literal["token", "sequence"]


def log_importance_ratio(logprobs: Tensor, old_logprobs: Tensor, batch: Batch, *, level: Level) -> Tensor:
    """[T] log(pi / pi_old) of each loss token, or of its sequence: the mean over its tokens (GSPO, arXiv
    2507.18071).
    """
    log_ratio = masked(logprobs, batch["loss_mask"]) - masked(old_logprobs, batch["loss_mask"])
    if level == "token":
        return log_ratio
    assert level == "sequence", f"importance_sampling_level={level!r}"
    return batch.per_token(sequence_token_means(log_ratio, batch))


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

    grpo, sapo: mean over sequences of each one's token mean; luspo: of each one's token sum (arXiv 2602.05261);
    bnpo: mean over the step's tokens; dr_grpo: sum over (sequences * max_completion_length), arXiv 2503.20783;
    dapo, cispo, vespo: mean over the generation batch's tokens, a step's share.
    """
    if loss_type in ("grpo", "sapo"):
        return sequence_token_means(token_losses, batch).sum() / max(counts.sequences, 1.0)
    denominators = {
        "luspo": counts.sequences,
        "bnpo": counts.tokens,
        "dr_grpo": counts.sequences * max_completion_length,
        **dict.fromkeys(("dapo", "cispo", "vespo"), counts.generation_tokens),
    }
    assert loss_type in denominators, f"loss_type={loss_type!r}"
    denominator = denominators[loss_type]
    assert denominator == denominator, f"{loss_type} needs counts.generation_tokens"
    return masked(token_losses, batch["loss_mask"]).sum() / max(denominator, 1.0)


class _Step(NamedTuple):
    """A microbatch as the losses see it; token columns are 0 off the loss mask."""

    batch: Batch
    counts: Counts
    level: Level
    logprobs: Tensor  # [T] with its graph
    log_ratio: Tensor  # [T] of each token
    ratio: Tensor  # [T] of each token, or of its sequence
    advantages: Tensor  # [S]

    @property
    def token_advantages(self) -> Tensor:
        return self.batch.per_token(self.advantages)


def _step(outputs: dict[str, Tensor], batch: Batch, counts: Counts, level: Level) -> _Step:
    logprobs = masked(outputs["logprobs"], batch["loss_mask"])
    old_logprobs = loss_column(batch, "old_logprobs", logprobs) if "old_logprobs" in batch else logprobs.detach()
    return _Step(
        batch,
        counts,
        level,
        logprobs,
        log_importance_ratio(logprobs, old_logprobs, batch, level="token"),
        log_importance_ratio(logprobs, old_logprobs, batch, level=level).exp(),
        sequence_column(batch, "advantages", logprobs),
    )


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
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the policy loss + beta * KL - entropy_coef * entropy, and its share of TRL's
    metrics.

    `outputs`: "logprobs" [T] with its graph, "entropy" [T], with its graph if there is a coefficient. Columns:
    loss_mask [T], advantages [S]; optional are old_logprobs [T] (else the policy's own: the first update on
    fresh samples), importance_weights [T] (see importance.rollout_importance_weights); ref_logprobs [T] when
    beta != 0; rollout_logprobs [T] with `off_policy_mask_threshold`; entropy_mask [T] (see entropy.py) and
    counts["entropy_tokens"] when top_entropy_quantile < 1. `use_bias_correction_kl` weights the KL by the
    importance ratio, its gradient included (DeepSeek-V3.2, arXiv 2512.02556). `entropy_coef` is this step's
    number; None is no bonus, 0 a bonus at rest. A batch without sequences needs no columns but loss_mask and
    gives an exact 0 with a graph.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    step = _step(outputs, batch, counts, importance_sampling_level)
    weights = loss_column(batch, "importance_weights", step.logprobs) if "importance_weights" in batch else None
    if loss_type == "cispo":
        losses, metrics = _cispo(step, epsilon_high=high)
    elif loss_type == "sapo":
        temperatures = {"temperature_pos": sapo_temperature_pos, "temperature_neg": sapo_temperature_neg}
        losses, metrics = sapo_loss(step.ratio, step.token_advantages, **temperatures), {}
    elif loss_type == "vespo":
        shape = {"k_pos": vespo_k_pos, "lambda_pos": vespo_lambda_pos, "k_neg": vespo_k_neg}
        losses, metrics = _vespo(step, weights, **shape, lambda_neg=vespo_lambda_neg)
        weights = None  # they are in its phi
    else:
        losses, metrics = _clipped(step, epsilon=epsilon, epsilon_high=high, delta=delta)

    losses = losses * _kept(step, off_policy_mask_threshold, top_entropy_quantile)
    if weights is not None:
        losses = losses * weights
    metrics["entropy"] = token_mean(outputs["entropy"], batch["loss_mask"], counts.tokens)
    if beta != 0.0:
        kl = k3(step.logprobs, loss_column(batch, "ref_logprobs", step.logprobs))
        kl = kl * step.ratio if use_bias_correction_kl else kl
        losses = losses + beta * kl
        metrics["kl"] = token_mean(kl, batch["loss_mask"], counts.tokens)
    loss = aggregated(losses, batch, counts, loss_type=loss_type, max_completion_length=max_completion_length)
    if entropy_coef is not None:
        metrics["policy_loss"] = Metric(loss.detach())
        how = {"top_entropy_quantile": top_entropy_quantile}
        bonus, metrics["bonus_entropy"] = entropy_bonus(outputs["entropy"], batch, counts, **how)
        loss = loss - entropy_coef * bonus
    return loss, metrics


def _clipped(
    step: _Step, *, epsilon: float, epsilon_high: float, delta: float | None
) -> tuple[Tensor, dict[str, Metric]]:
    """[T] losses of grpo, bnpo, dr_grpo, dapo and luspo, and clip_ratio/*."""
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    advantages = step.token_advantages
    losses = clipped_policy_loss(step.ratio, advantages, **clips, delta=delta)
    ratio = step.ratio if delta is None else step.ratio.clamp(max=delta)  # TRL looks at the bounded ratio
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return losses, clip_metrics(low, high, step.batch, step.counts, level=step.level)


def _cispo(step: _Step, *, epsilon_high: float) -> tuple[Tensor, dict[str, Metric]]:
    """[T] losses, and cispo_clip_ratio."""
    advantages = step.token_advantages
    losses = cispo_loss(step.logprobs, step.ratio, advantages, epsilon_high=epsilon_high)
    clipped = ((step.ratio > epsilon_high) & (advantages > 0)).float()
    return losses, {"cispo_clip_ratio": level_mean(clipped, step.batch, step.counts, level=step.level)}


def _vespo(step: _Step, weights: Tensor | None, **shape: float) -> tuple[Tensor, dict[str, Metric]]:
    """[T] losses, and vespo/phi_seq_mean."""
    phi = vespo_weights(step.log_ratio, step.advantages, step.batch, importance_weights=weights, **shape)
    losses = -step.batch.per_token(phi * step.advantages) * step.logprobs
    return losses, {"vespo/phi_seq_mean": sequence_mean(phi, step.counts.sequences)}


def _kept(step: _Step, off_policy_mask_threshold: float | None, top_entropy_quantile: float) -> Tensor:
    """[T] 1.0 for a token that the policy loss acts on; KL and denominators are of all loss tokens, as in TRL."""
    kept = bonus_mask(step.batch, top_entropy_quantile=top_entropy_quantile).to(step.logprobs.dtype)
    if off_policy_mask_threshold is not None:
        near = off_policy_mask(step.logprobs, step.advantages, step.batch, threshold=off_policy_mask_threshold)
        kept = kept * step.batch.per_token(near.to(kept.dtype))
    return kept


def level_mean(values: Tensor, batch: Batch, counts: Counts, *, level: Level) -> Metric:
    """[T] -> share of the mean over loss tokens, or over sequences where the ratio is a sequence's; there a
    sequence without loss tokens counts as 0.
    """
    if level == "token":
        return token_mean(values, batch["loss_mask"], counts.tokens)
    # Every token of a sequence carries the same value, so its mean is that value.
    return sequence_mean(sequence_token_means(values, batch), counts.sequences)


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
    low, high = low_clipped.float(), high_clipped.float()
    has_tokens = batch.per_sequence_sum(batch["loss_mask"].float()) > 0
    metrics = {
        f"clip_ratio/{name}_mean": level_mean(values, batch, counts, level=level)
        for name, values in (("low", low), ("high", high), ("region", torch.maximum(low, high)))
    }
    metrics["clip_ratio/low_min"] = minimum(sequence_token_means(low, batch)[has_tokens])
    metrics["clip_ratio/high_max"] = maximum(sequence_token_means(high, batch)[has_tokens])
    return metrics
