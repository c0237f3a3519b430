"""KL(policy || reference) estimated from samples of the policy (J. Schulman, "Approximating KL divergence")."""

from __future__ import annotations

from torch import Tensor


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[T], [T] -> [T] ref/pi - log(ref/pi) - 1: unbiased and never negative (GRPO, arXiv 2402.03300 eq. 4).

    Of the sampled tokens' log probabilities; differentiable in both.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1
