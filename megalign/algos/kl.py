"""Estimators of KL(policy || reference) from samples of the policy (J. Schulman, "Approximating KL
divergence").

Each takes the [T] log probabilities of the sampled tokens and gives a [T] estimate, differentiable in both.
"""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(pi / ref): unbiased, of either sign, high variance."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(pi / ref)^2 / 2: biased, never negative."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/pi - log(ref/pi) - 1: unbiased and never negative (GRPO, arXiv 2402.03300 eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1
