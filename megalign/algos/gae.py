"""Generalized advantage estimation (arXiv 1506.02438) over packed completions, and whitening over a whole batch.

values[t] is the value of the state in which token t was chosen, so rewards, values, advantages and returns all
stand on the loss tokens; what lies between them (a tool's answer) is no step of the agent and is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.algos.masked import masked
from megalign.batch import Batch


@torch.no_grad()
def gae(
    rewards: Tensor,  # [T]
    values: Tensor,  # [T]
    batch: Batch,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages [T] and returns [T] (advantage + value), 0 off the loss mask (arXiv 1506.02438 eq. 16).

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}; the value behind a
    completion's last loss token is 0.
    """
    positions = batch["loss_mask"].nonzero().squeeze(1)
    rows, columns = _places(batch, positions)
    size = (batch.num_sequences, int(columns.max()) + 2 if len(columns) else 1)
    rewards_table = _table(rewards, positions, rows, columns, size)
    values_table = _table(values, positions, rows, columns, size)
    deltas = rewards_table[:, :-1] + gamma * values_table[:, 1:] - values_table[:, :-1]
    advantages = torch.zeros_like(values_table)
    for step in reversed(range(deltas.shape[1])):
        advantages[:, step] = deltas[:, step] + gamma * lam * advantages[:, step + 1]
    returns = advantages + values_table
    return tuple(
        values.new_zeros(batch.num_tokens).index_copy(0, positions, table[rows, columns].to(values.dtype))
        for table in (advantages, returns)
    )


def _places(batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """For each loss token, its sequence and how many loss tokens of the sequence come before it."""
    rows = batch.sequence_ids[positions]
    counts = torch.bincount(rows, minlength=batch.num_sequences)
    firsts = counts.cumsum(0) - counts
    return rows, torch.arange(len(positions), device=positions.device) - firsts[rows]


def _table(column: Tensor, positions: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """[T] -> [S, L + 1] float64: a sequence's loss tokens side by side, zeros behind them."""
    table = torch.zeros(size, dtype=torch.float64, device=column.device)
    table[rows, columns] = column[positions].double()
    return table


def moments(column: Tensor, mask: Tensor) -> Tensor:
    """[T] -> [3] float64: count, sum and sum of squares of what is masked in; those of microbatches and ranks
    add up.
    """
    values = masked(column.detach(), mask).double()
    return torch.stack([mask.sum().double(), values.sum(), values.square().sum()])


def whitened(column: Tensor, mask: Tensor, moments: Tensor, *, shift_mean: bool) -> Tensor:
    """[T] -> [T] (x - mean) / sqrt(variance + 1e-8), Bessel's variance, of the batch that the moments are of;
    0 off the mask. With `shift_mean` False the mean stays.
    """
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1.0)
    variance = ((squares - total * mean) / (count - 1).clamp(min=1.0)).clamp(min=0.0)
    values = (column.double() - mean) * torch.rsqrt(variance + 1e-8)
    values = values if shift_mean else values + mean
    return masked(values.to(column.dtype), mask)
