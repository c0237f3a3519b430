"""What a token of a sampled completion adds to a policy-gradient loss: one function for each family of losses.

[T] tokens and [S] sequences of one packed microbatch. Ratios are pi / pi_old; masks and denominators are not
here (see policy.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalign.algos.masked import masked
from megalign.batch import Batch

# TRL's bounds of the sequence's log weight, which keep exp() finite.
VESPO_LOG_WEIGHT_RANGE = (math.log(1e-8), 20.0)


def clipped_policy_loss(
    ratio: Tensor,  # [T]
    advantages: Tensor,  # [T]
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Tensor:
    """[T] -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) (PPO, arXiv 1707.06347 eq. 7).

    `delta` also bounds the first ratio from above, which matters where A < 0 (two-sided clipping, INTELLECT-2,
    arXiv 2505.07291).
    """
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(bounded * advantages, clipped * advantages)


def cispo_loss(
    logprobs: Tensor,  # [T]
    ratio: Tensor,  # [T]
    advantages: Tensor,  # [T]
    *,
    epsilon_high: float,
) -> Tensor:
    """[T] -min(ratio, epsilon_high) * A * log pi, the ratio a constant (CISPO, arXiv 2506.13585).

    epsilon_high is the bound itself, not its distance from 1.
    """
    return -ratio.detach().clamp(max=epsilon_high) * advantages * logprobs


def sapo_loss(
    ratio: Tensor,  # [T]
    advantages: Tensor,  # [T]
    *,
    temperature_pos: float,
    temperature_neg: float,
) -> Tensor:
    """[T] -(4 / t) * sigmoid(t * (ratio - 1)) * A, t by the sign of A (SAPO, arXiv 2511.20347)."""
    temperature = torch.where(advantages > 0, temperature_pos, temperature_neg).to(ratio.dtype)
    return -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages


@torch.no_grad()
def vespo_weights(
    log_ratio: Tensor,  # [T] of each token
    advantages: Tensor,  # [S]
    batch: Batch,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    importance_weights: Tensor | None = None,  # [T] pi_old / pi_sampler of each token
) -> Tensor:
    """[S] phi(w) = w^k * exp(lambda * (1 - w)), a constant, w the product of a sequence's token ratios (VESPO,
    arXiv 2602.10693); k and lambda by the sign of A.

    The sampler's correction enters w instead of the loss.
    """
    mask = batch["loss_mask"]
    log_weight = batch.per_sequence_sum(masked(log_ratio.clamp(-20.0, 20.0), mask))
    if importance_weights is not None:
        correction = importance_weights.log().clamp(*VESPO_LOG_WEIGHT_RANGE)
        log_weight = log_weight + batch.per_sequence_sum(masked(correction, mask))
    log_weight = log_weight.clamp(*VESPO_LOG_WEIGHT_RANGE)
    k = torch.where(advantages >= 0, k_pos, k_neg).to(log_weight.dtype)
    scale = torch.where(advantages >= 0, lambda_pos, lambda_neg).to(log_weight.dtype).clamp(min=1e-4)
    weights = (scale + k * log_weight - scale * log_weight.exp()).exp()
    # A lambda near 0 lets the weight leave the range of floats; as in TRL it is then none.
    return weights.masked_fill(weights.isinf(), 0.0)
