"""Advantages of groups of completions of one prompt (GRPO, arXiv 2402.03300 section 4.1.2; GDPO, arXiv
2601.05242).

N completions of the whole generation batch, neighbours in groups of G; F reward functions. A NaN reward means
that the function does not apply to that completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"] | bool
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

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


def normalized_rewards(rewards: Tensor, num_generations: int) -> Tensor:
    """[N, F] -> [N, F], each function's reward against its group's mean and standard deviation."""
    groups = rewards.view(-1, num_generations, rewards.shape[1])
    stds = group_stds(groups, num_generations)[:, None]
    normalized = (groups - groups.nanmean(dim=1, keepdim=True)) / (stds + STD_OFFSET)
    return normalized.view_as(rewards)


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
    return group_stds(totals.view(-1, num_generations), num_generations).repeat_interleave(num_generations)


def group_stds(groups: Tensor, num_generations: int) -> Tensor:
    """[N / G, G, ...] -> [N / G, ...]; 0 in an evaluation with one completion a prompt."""
    return nanstd(groups, dim=1) if num_generations > 1 else torch.zeros_like(groups[:, 0])


def group_means(totals: Tensor, num_generations: int) -> Tensor:
    """[N] -> [N], the mean over the scored completions of each one's group."""
    return totals.view(-1, num_generations).nanmean(dim=1).repeat_interleave(num_generations)


def group_advantages(
    rewards: Tensor,  # [N, F], NaN where a function gave None
    weights: Tensor,  # [F]
    *,
    num_generations: int,
    scale_rewards: ScaleRewards,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
) -> Tensor:
    """[N]: (reward - mean of its group) / (std + 1e-4); 0 for a completion that no function scored.

    `scale_rewards` picks the std: the group's, the whole batch's, or no division. `normalize_then_sum` (GDPO)
    normalizes each function's rewards in their groups first, and the weighted sum over the batch after.
    """
    totals = _totals(rewards, weights, num_generations, multi_objective_aggregation)
    if multi_objective_aggregation == "normalize_then_sum":
        advantages = (totals - totals.nanmean()) / (reward_stds(totals, num_generations, "batch") + STD_OFFSET)
        return advantages.nan_to_num(nan=0.0)
    advantages = totals - group_means(totals, num_generations)
    if scaling(scale_rewards) != "none":
        advantages = advantages / (reward_stds(totals, num_generations, scale_rewards) + STD_OFFSET)
    return advantages.nan_to_num(nan=0.0)


def _totals(rewards: Tensor, weights: Tensor, num_generations: int, aggregation: Aggregation) -> Tensor:
    """[N], NaN where no function applies."""
    if aggregation == "sum_then_normalize":
        return combined_rewards(rewards, weights)
    assert aggregation == "normalize_then_sum", f"multi_objective_aggregation={aggregation!r}"
    totals = (normalized_rewards(rewards, num_generations) * weights).nansum(dim=1)
    return totals.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def reward_metrics(
    rewards: Tensor,  # [N, F]
    weights: Tensor,  # [F]
    names: Sequence[str],
    *,
    num_generations: int,
    scale_rewards: ScaleRewards,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
) -> dict[str, float]:
    """TRL's `reward`, `reward_std`, `frac_reward_zero_std` and `rewards/<function>/{mean,std}` of a
    generation batch.

    NaN where nothing was scored. They are whole numbers of the job, not shares: every rank holds all
    rewards.
    """
    scale = "batch" if multi_objective_aggregation == "normalize_then_sum" else scale_rewards
    totals = _totals(rewards, weights, num_generations, multi_objective_aggregation)
    return reward_summary(rewards, weights, names, reward_stds(totals, num_generations, scale))


def reward_summary(rewards: Tensor, weights: Tensor, names: Sequence[str], stds: Tensor) -> dict[str, float]:
    """[N, F], [F], [N] -> the same, from the standard deviations that the advantages are made of."""
    totals = combined_rewards(rewards, weights)
    metrics = {
        "reward": totals.nanmean().item(),
        "reward_std": nanstd(totals, dim=0).item(),
        "frac_reward_zero_std": torch.isclose(stds, torch.zeros_like(stds)).float().mean().item(),
    }
    for name, column in zip(names, rewards.unbind(dim=1), strict=True):
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
        metrics[f"rewards/{name}/std"] = nanstd(column, dim=0).item()
    return metrics
