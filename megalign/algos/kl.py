"""KL(policy || reference) estimated from samples of the policy (J. Schulman, "Approximating KL divergence").

Each takes the sampled tokens' log probabilities, [T] and [T] -> [T], and is differentiable in both.
"""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(pi / ref): unbiased, of either sign."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/pi - log(ref/pi) - 1: unbiased and never negative (GRPO, arXiv 2402.03300 eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


KL_ESTIMATORS = {"k1": k1, "k3": k3}
