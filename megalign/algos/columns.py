"""A batch's columns as a loss reads them: in the outputs' dtype, and empty on a batch without sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.batch import Batch


def token_column(batch: Batch, name: str, like: Tensor) -> Tensor:
    """[T] the column; zeros on a batch that has no sequences, hence no need of it (`Batch.dummy`)."""
    if batch.num_sequences == 0 and name not in batch:
        return torch.zeros_like(like)
    return batch[name].to(like.dtype)


def sequence_column(batch: Batch, name: str, like: Tensor) -> Tensor:
    """[S] the column; empty on a batch that has no sequences."""
    if batch.num_sequences == 0 and name not in batch:
        return like.new_zeros(0)
    return batch[name].to(like.dtype)
