"""Preference pairs of a packed batch: sequences 0, 2, 4, ... are chosen, each one's next is rejected.

P = S / 2 pairs of one microbatch. Global counts that all pair losses name: "chosen_tokens" and "rejected_tokens", the
loss tokens of either kind; the pairs of the step are half of its sequences.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megalign.algos.masked import sequence_mean
from megalign.batch import Batch, Counts, Metric


class Pair(NamedTuple):
    """One value for each chosen and one for each rejected sequence."""

    chosen: Tensor  # [P]
    rejected: Tensor  # [P]

    @classmethod
    def of(cls, column: Tensor) -> Pair:
        """[S] -> the two kinds, [P] each."""
        assert len(column) % 2 == 0, f"{len(column)} sequences are not whole pairs"
        return cls(column[0::2], column[1::2])

    @property
    def delta(self) -> Tensor:
        """[P] chosen - rejected."""
        return self.chosen - self.rejected


def chosen_mask(batch: Batch) -> Tensor:
    """[T] bool: the loss tokens of chosen sequences."""
    return batch["loss_mask"] & (batch.sequence_ids % 2 == 0)


def rejected_mask(batch: Batch) -> Tensor:
    """[T] bool: the loss tokens of rejected sequences."""
    return batch["loss_mask"] & (batch.sequence_ids % 2 == 1)


def chosen_tokens(batch: Batch) -> Tensor:
    """0-dimensional: this batch's part of the count of that name."""
    return chosen_mask(batch).sum()


def rejected_tokens(batch: Batch) -> Tensor:
    """0-dimensional: this batch's part of the count of that name."""
    return rejected_mask(batch).sum()


def num_pairs(counts: Counts) -> float:
    """The step's pairs, at least 1 so that it can be divided by."""
    return max(counts.sequences / 2, 1.0)


def reward_metrics(rewards: Pair, counts: Counts) -> dict[str, Metric]:
    """TRL's rewards/*: means over pairs; a tie, as fp32 sees it, is not an accurate pair."""
    pairs = num_pairs(counts)
    is_accurate = rewards.chosen.float() > rewards.rejected.float()
    columns = {
        "chosen": rewards.chosen,
        "rejected": rewards.rejected,
        "accuracies": is_accurate.to(rewards.chosen.dtype),
        "margins": rewards.delta,
    }
    return {f"rewards/{name}": sequence_mean(column, pairs) for name, column in columns.items()}


def logps_metrics(logps: Pair, counts: Counts) -> dict[str, Metric]:
    """TRL's logps/*: means over pairs."""
    pairs = num_pairs(counts)
    return {
        "logps/chosen": sequence_mean(logps.chosen, pairs),
        "logps/rejected": sequence_mean(logps.rejected, pairs),
    }
