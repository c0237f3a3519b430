"""The entropy of the policy in its loss: which tokens are uncertain enough to learn from, and a bonus.

Which tokens those are follows from a quantile over the whole step, so it is a column (`entropy_mask`) from a
pass without gradient before the step, not something that the loss of a microbatch could know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megalign.algos.masked import masked, token_mean
from megalign.batch import Batch, Counts, Metric


def entropy_threshold(entropies: Tensor, top_entropy_quantile: float) -> Tensor:
    """[N] of all loss tokens of the step, over all ranks -> 0-dim, the entropy which the share
    `top_entropy_quantile` of them reaches (arXiv 2506.01939).

    Interpolated between the two nearest values; +inf where there is no token.
    """
    if entropies.numel() == 0:
        return entropies.new_full((), torch.inf)
    # torch.quantile refuses more than 2^24 values, which a large step has.
    ordered = entropies.sort().values
    rank = (1 - top_entropy_quantile) * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below].double(), ordered[above].double(), rank - below).to(entropies.dtype)


def high_entropy_mask(entropies: Tensor, loss_mask: Tensor, threshold: Tensor | float) -> Tensor:
    """[T], [T] -> [T] bool, the loss tokens whose entropy reaches the threshold: the column `entropy_mask`.

    The first tokens of a prompt's completions have one entropy, which each layout rounds in its own way: what lies
    within 1e-5 of the threshold reaches it, so that all of them are in or none is.
    """
    threshold = torch.as_tensor(threshold, dtype=entropies.dtype, device=entropies.device)
    return loss_mask & (entropies >= threshold - 1e-5 * (1 + threshold.abs()))


def bonus_mask(batch: Batch, *, top_entropy_quantile: float) -> Tensor:
    """[T] bool, the tokens that the policy loss and the bonus act on: `entropy_mask` if there is a quantile."""
    if top_entropy_quantile >= 1.0 or batch.num_sequences == 0:
        return batch["loss_mask"]
    return batch["loss_mask"] & batch["entropy_mask"]


def entropy_tokens(batch: Batch) -> Tensor:
    """0-dim, how many tokens `entropy_mask` leaves to this microbatch."""
    return bonus_mask(batch, top_entropy_quantile=0.0).sum()


ENTROPY_COUNTS: Mapping[str, Callable[[Batch], Tensor]] = {"entropy_tokens": entropy_tokens}


def entropy_bonus(
    entropies: Tensor,  # [T] with its graph
    batch: Batch,
    counts: Counts,
    *,
    top_entropy_quantile: float,
) -> tuple[Tensor, Metric]:
    """This microbatch's share of the mean entropy over the tokens that the policy loss acts on, and the same as
    a metric (it steers an adaptive coefficient); the loss is less a coefficient times it.

    With a quantile, those tokens are counted by counts["entropy_tokens"] (ENTROPY_COUNTS).
    """
    mask = bonus_mask(batch, top_entropy_quantile=top_entropy_quantile)
    num_tokens = counts.tokens if top_entropy_quantile >= 1.0 else counts["entropy_tokens"]
    return masked(entropies, mask).sum() / max(num_tokens, 1.0), token_mean(entropies, mask, num_tokens)
