"""ORPO: likelihood of the chosen answers and their odds against the rejected ones, without a reference
(arXiv 2403.07691).

T tokens, P pairs of one microbatch. A loss is a sum already divided by the step's global counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megalign.algos.columns import token_column
from megalign.algos.masked import masked, sequence_mean, token_mean
from megalign.algos.pairs import (
    Pair,
    chosen_mask,
    chosen_tokens,
    logps_metrics,
    num_pairs,
    rejected_mask,
    rejected_tokens,
    reward_metrics,
)
from megalign.batch import Batch, Counts, Metric

# A mean log probability of 0 has infinite odds. The nearest below 0 that float32 gives is about -6e-8 / length.
MAX_MEAN_LOGPROB = -1e-12


def _chosen_completion_tokens(batch: Batch) -> Tensor:
    return (chosen_mask(batch) & _completions(batch)).sum()


ORPO_COUNTS: Mapping[str, Callable[[Batch], Tensor]] = {
    "chosen_tokens": chosen_tokens,  # prompts included
    "chosen_completion_tokens": _chosen_completion_tokens,
    "rejected_tokens": rejected_tokens,
}


def orpo_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    beta: float,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of NLL(chosen) - beta * mean(log s(log odds ratio)) (eq. 6), and of TRL's metrics.

    `outputs`: logprobs [T] with its graph, mean_logits [T] where the engine gives it. Columns: loss_mask, True for
    all tokens but the first of a chosen sequence and for a rejected completion; completion_mask [T], 1.0 on
    completions. Counts: ORPO_COUNTS. The NLL is over prompt and completion; a completion's probability is the
    geometric mean over its tokens. logits/* are means over completion tokens (TRL's also over prompts and padding).
    """
    logprobs, pairs = outputs["logprobs"], num_pairs(counts)
    nll = -masked(logprobs, chosen_mask(batch)).sum() / max(counts["chosen_tokens"], 1.0)
    logps = Pair.of(_mean_logprobs(logprobs, batch))
    log_odds = odds_ratios(logps)
    ratio = logsigmoid(log_odds)
    metrics = {
        **reward_metrics(Pair(beta * logps.chosen, beta * logps.rejected), counts),
        **logps_metrics(logps, counts),
        **_logits_metrics(outputs, batch, counts),
        "nll_loss": Metric(nll.detach()),
        "log_odds_ratio": sequence_mean(ratio, pairs),
        "log_odds_chosen": sequence_mean(log_odds, pairs),
    }
    return nll - beta * ratio.sum() / pairs, metrics


def odds_ratios(logps: Pair) -> Tensor:
    """[P] log(odds_c / odds_r), odds = p / (1 - p), of mean log probabilities (eq. 4); finite up to p = 1."""
    chosen, rejected = (side.clamp(max=MAX_MEAN_LOGPROB) for side in logps)
    # expm1 keeps 1 - p apart from 0 where p is next to 1.
    return chosen - rejected - (-torch.expm1(chosen)).log() + (-torch.expm1(rejected)).log()


def _completions(batch: Batch) -> Tensor:
    return token_column(batch, "completion_mask", batch["loss_mask"])


def _mean_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:
    """[T] -> [S], the mean over each completion's tokens; 0 for an empty one; differentiable."""
    counted = batch["loss_mask"] & _completions(batch)
    lengths = batch.per_sequence_sum(counted.to(logprobs.dtype))
    return batch.per_sequence_sum(masked(logprobs, counted)) / lengths.clamp(min=1.0)


def _logits_metrics(outputs: dict[str, Tensor], batch: Batch, counts: Counts) -> dict[str, Metric]:
    if "mean_logits" not in outputs:
        return {}
    logits, chosen = outputs["mean_logits"], chosen_mask(batch) & _completions(batch)
    return {
        "logits/chosen": token_mean(logits, chosen, counts["chosen_completion_tokens"]),
        "logits/rejected": token_mean(logits, rejected_mask(batch), counts["rejected_tokens"]),
    }
