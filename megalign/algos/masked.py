"""Sums, means and extremes over the loss tokens and sequences of a packed batch.

A mean is a sum already divided by a GLOBAL count, so that adding up microbatches and ranks gives the mean; a
denominator of the rank's own would upweight ranks with few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.algos.columns import token_column
from megalign.batch import Batch, Metric


def token_mean(column: Tensor, mask: Tensor, num_tokens: float) -> Metric:
    """[T] -> this microbatch's share of the mean over all loss tokens."""
    return Metric(masked(column.detach(), mask).sum() / max(num_tokens, 1.0))


def sequence_mean(column: Tensor, num_sequences: float) -> Metric:
    """[S] -> this microbatch's share of the mean over all sequences."""
    return Metric(column.detach().sum() / max(num_sequences, 1.0))


def minimum(values: Tensor) -> Metric:
    """The smallest value; +inf, the neutral element, where there is none."""
    return Metric(torch.cat([values.detach(), values.new_full((1,), torch.inf)]).min(), "min")


def maximum(values: Tensor) -> Metric:
    """The largest value; -inf, the neutral element, where there is none."""
    return Metric(torch.cat([values.detach(), values.new_full((1,), -torch.inf)]).max(), "max")


def masked(column: Tensor, mask: Tensor) -> Tensor:
    """[T] -> [T], 0 where the mask is False whatever stood there (0 * inf would be NaN); differentiable."""
    return column.masked_fill(~mask, 0.0)


def loss_column(batch: Batch, name: str, like: Tensor) -> Tensor:
    """[T] a token column in the dtype of `like`, 0 off the loss mask."""
    return masked(token_column(batch, name, like), batch["loss_mask"])


def sequence_token_means(column: Tensor, batch: Batch) -> Tensor:
    """[T] -> [S], the mean over each sequence's loss tokens; 0 for a sequence without any; differentiable."""
    mask = batch["loss_mask"]
    counts = batch.per_sequence_sum(mask.to(column.dtype))
    return batch.per_sequence_sum(masked(column, mask)) / counts.clamp(min=1.0)
