"""Advantages of groups of completions of one prompt (GRPO, arXiv 2402.03300 section 4.1.2).

N completions of the whole generation batch, neighbours in groups of G; F reward functions. A NaN reward means
that the function does not apply to that completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"] | bool

STD_OFFSET = 1e-4  # TRL's, so that a group of equal rewards does not divide by zero


def nanstd(values: Tensor, dim: int) -> Tensor:
    """Standard deviation with Bessel's correction over the values that are not NaN; NaN if fewer than 2."""
    count = (~values.isnan()).sum(dim=dim)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim)
    variance = squares / (count - 1)
    return torch.where(count > 1, variance, torch.nan).sqrt()


def combined_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """[N, F], [F] -> [N]: the weighted sum over the functions that apply; NaN where none does."""
    total = (rewards * weights).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def scaling(scale_rewards: ScaleRewards) -> Literal["group", "batch", "none"]:
    """TRL also spells "group" as True and "none" as False."""
    name = {True: "group", False: "none"}.get(scale_rewards, scale_rewards)
    assert name in ("group", "batch", "none"), f"scale_rewards={scale_rewards!r}"
    return name


def reward_stds(totals: Tensor, num_generations: int, scale_rewards: ScaleRewards) -> Tensor:
    """[N] -> [N], the standard deviation which belongs to each completion: its group's or the batch's."""
    if scaling(scale_rewards) == "batch":
        std = nanstd(totals, dim=0) if totals.numel() > 1 else totals.new_zeros(())
        return std.expand_as(totals)
    if num_generations == 1:  # an evaluation with one completion a prompt
        return torch.zeros_like(totals)
    return nanstd(totals.view(-1, num_generations), dim=1).repeat_interleave(num_generations)


def group_advantages(
    rewards: Tensor,  # [N, F], NaN where a function gave None
    weights: Tensor,  # [F]
    *,
    num_generations: int,
    scale_rewards: ScaleRewards,
) -> Tensor:
    """[N]: (reward - mean of its group) / (std + 1e-4); 0 for a completion that no function scored.

    `scale_rewards` picks the std: the group's, the whole batch's, or no division.
    """
    totals = combined_rewards(rewards, weights)
    advantages = totals - group_means(totals, num_generations)
    if scaling(scale_rewards) != "none":
        advantages = advantages / (reward_stds(totals, num_generations, scale_rewards) + STD_OFFSET)
    return advantages.nan_to_num(nan=0.0)


def group_means(totals: Tensor, num_generations: int) -> Tensor:
    """[N] -> [N], the mean over the scored completions of each one's group."""
    return totals.view(-1, num_generations).nanmean(dim=1).repeat_interleave(num_generations)


def reward_metrics(
    rewards: Tensor,  # [N, F]
    weights: Tensor,  # [F]
    names: Sequence[str],
    *,
    num_generations: int,
    scale_rewards: ScaleRewards,
) -> dict[str, float]:
    """TRL's `reward`, `reward_std`, `frac_reward_zero_std` and `rewards/<function>/{mean,std}` of a
    generation batch.

    NaN where nothing was scored. They are whole numbers of the job, not shares: every rank holds all
    rewards.
    """
    totals = combined_rewards(rewards, weights)
    stds = reward_stds(totals, num_generations, scale_rewards)
    metrics = {
        "reward": totals.nanmean().item(),
        "reward_std": nanstd(totals, dim=0).item(),
        "frac_reward_zero_std": torch.isclose(stds, torch.zeros_like(stds)).float().mean().item(),
    }
    for name, column in zip(names, rewards.unbind(dim=1), strict=True):
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
        metrics[f"rewards/{name}/std"] = nanstd(column, dim=0).item()
    return metrics
