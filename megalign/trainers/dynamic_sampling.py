"""DAPO's dynamic sampling (arXiv 2503.14476 sec. 3.2): groups whose rewards are all equal teach nothing, and are
replaced by groups of further prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from megalign.algos.advantages import combined_rewards
from megalign.data.sampler import EpochSampler
from megalign.rollout.rewards import RewardResult
from megalign.trainers.sampling import Sampled

Draw = Callable[[list[dict[str, Any]], int], Sampled]  # prompts, number of the drawing in its round

_FAR = 2**31  # from the training's epochs, within the 32 bits of a seed that torch's CPU generator reads


class Refill:
    """Fills a round with groups that have a variance, from a stream of prompts of its own."""

    def __init__(self, args: Any, weights: Tensor) -> None:
        self._args, self._weights = args, weights
        # RLOO's config has no such field.
        self._each_alone = getattr(args, "multi_objective_aggregation", None) == "normalize_then_sum"
        self._position = {"epoch": 0, "position": 0}

    def filled(self, first: Sampled, draw: Draw, prompts: Dataset, num_groups: int) -> tuple[Sampled, dict[str, float]]:
        """`num_groups` groups; when the rounds are used up, groups without variance make up the number.

        The further prompts are drawn in an order of their own, so that an epoch still sees each row once at least.
        """
        seed = self._args.data_order_seed + _FAR  # the training's epoch e takes data_order_seed + e
        sampler = EpochSampler(len(prompts), num_groups, seed=seed, shuffle=True, drop_last=True)
        sampler.load_state_dict(self._position)
        drawn, limit = [first], self._args.dynamic_sampling_max_rounds
        while len(kept := self._informative(drawn)) < num_groups and len(drawn) < limit:
            drawn.append(draw([prompts[row] for row in next(sampler)], len(drawn)))
        self._position = sampler.state_dict()
        groups = [(part, group) for part, one in enumerate(drawn) for group in range(self._num_groups(one))]
        chosen = [*kept, *(group for group in groups if group not in set(kept))][:num_groups]
        rewards = torch.cat([combined_rewards(one.scored.rewards, self._weights) for one in drawn])
        metrics = {
            "dynamic_sampling/rounds": float(len(drawn)),
            "dynamic_sampling/kept": len(kept) / len(groups),
            "dynamic_sampling/unfilled": float(max(0, num_groups - len(kept))),
            "dynamic_sampling/reward": rewards.nanmean().item(),
        }
        return self._joined(drawn, chosen), metrics

    def state_dict(self) -> dict[str, int]:
        """Where the stream of further prompts stands."""
        return self._position

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict` was taken."""
        self._position = state

    def _num_groups(self, sampled: Sampled) -> int:
        return len(sampled.completions) // self._args.num_generations

    def _informative(self, drawn: Sequence[Sampled]) -> list[tuple[int, int]]:
        """(drawing, group) of the groups with two different rewards."""
        return [
            (part, group)
            for part, one in enumerate(drawn)
            for group, rewards in enumerate(self._compared(one).split(self._args.num_generations))
            if any(len(set(column[~column.isnan()].tolist())) > 1 for column in rewards.T)
        ]

    def _compared(self, one: Sampled) -> Tensor:
        """[N, columns] what advantages are taken of: the sums, or each reward that counts where each has its own."""
        if self._each_alone:
            return one.scored.rewards[:, self._weights != 0]
        return combined_rewards(one.scored.rewards, self._weights)[:, None]

    def _joined(self, drawn: Sequence[Sampled], groups: Sequence[tuple[int, int]]) -> Sampled:
        """The groups as one round, its completions numbered anew."""
        size = self._args.num_generations
        places = [(part, group * size + member) for part, group in groups for member in range(size)]
        completions = [
            replace(drawn[part].completions[place], index=index) for index, (part, place) in enumerate(places)
        ]
        extras = dict.fromkeys(column for one in drawn for column in one.scored.extra)
        names = dict.fromkeys(name for one in drawn for name in one.scored.metrics)
        reported = {name: [one.scored.metrics[name] for one in drawn if name in one.scored.metrics] for name in names}
        scored = RewardResult(
            rewards=torch.stack([drawn[part].scored.rewards[place] for part, place in places]),
            extra={
                column: [drawn[part].scored.extra[column][place] if column in drawn[part].scored.extra else None
                         for part, place in places]
                for column in extras
            },
            metrics={name: sum(values) / len(values) for name, values in reported.items()},
        )  # fmt: skip
        return Sampled(completions, scored)
