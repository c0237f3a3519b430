"""Sampling: the policy's weights into the rollout engine, completions to every rank, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megalign.batch import Completion
from megalign.data.rows import ROW_NUMBER, numbers_of
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups
from megalign.resharding.sync import sync_weights
from megalign.rollout.engine import GenerationParams, RolloutEngine, awake
from megalign.rollout.failing import EngineError, agree_on_failure
from megalign.rollout.redistribute import redistribute
from megalign.rollout.rewards import RewardResult
from megalign.train_engine import TrainEngine
from megalign.trainers.rewarding import Rewarding
from megalign.trainers.run import Run


class Sampled(NamedTuple):
    """Completions of whole groups and what they are worth."""

    completions: list[Completion]
    scored: RewardResult


class Place(NamedTuple):
    """Where in the run something is sampled: its seeds follow from it alone."""

    stream: str  # train or eval
    round: int = 0
    part: int = 0  # above 0 for what a round samples again (dynamic sampling)


class Sampling:
    """What the policy answers, and the rewards; every method is collective, every rank gets everything."""

    def __init__(
        self,
        args: Any,
        groups: ParallelGroups,
        run: Run,
        *,
        policy: TrainEngine,
        rollout: RolloutEngine,
        fresh_rollout: Callable[[], RolloutEngine],
        rewards: Rewarding,
        tokenizer: Any,
        generation: GenerationParams,
    ) -> None:
        self._args, self._groups, self._run = args, groups, run
        self._policy, self._rewards, self._tokenizer = policy, rewards, tokenizer
        self.rollout, self._fresh_rollout = rollout, fresh_rollout
        self._restarts = 0
        self._generation = generation
        self._synced = False  # whether the rollout engine holds the policy's present weights

    def policy_changed(self) -> None:
        """The rollout engine's weights are old."""
        self._synced = False

    def __call__(self, prompts: Sequence[dict[str, Any]], num_generations: int, place: Place) -> Sampled:
        """`num_generations` neighbouring completions of each prompt, scored."""
        self._sync(place)
        completions = self._generate(prompts, num_generations, place)
        return Sampled(completions, self._score(completions, num_generations, place))

    def texts(self, completions: Sequence[Completion]) -> list[str]:
        """The completions as the reward functions see them."""
        ids = [completion.completion_ids for completion in completions]
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _sync(self, place: Place) -> None:
        # An engine that has slept has lost its weights, the policy's present ones or not.
        if self._synced and not self._args.engines_sleep:
            return
        with self._run.phases("weight_sync"), awake(self._policy), awake(self.rollout, "weights"):
            synced = sync_weights(self._policy, self.rollout)
        if place.stream == "train":
            self._run.window.add(synced.metrics)
        self._synced = True

    def _generate(self, prompts: Sequence[dict[str, Any]], num_generations: int, place: Place) -> list[Completion]:
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        seeds = completion_seeds(self._args.seed, place, len(rows))
        ids = [row["prompt_ids"] for row in rows]
        completions = None
        while completions is None:
            try:
                completions = self._completions(ids, seeds, place)
            except EngineError as failure:
                self._restart(failure, place)
        for completion, row in zip(completions, rows, strict=True):
            completion.row = {name: value for name, value in row.items() if name not in ("prompt_ids", ROW_NUMBER)}
            (completion.row_number,) = numbers_of(row)
        return completions

    def _completions(self, ids: list[list[int]], seeds: list[int], place: Place) -> list[Completion]:
        """Of the whole job; EngineError on all ranks alike, which leaves the engine as it is."""
        with self._run.phases("generation"), awake(self.rollout):
            mine, failure = [], None
            try:
                mine = self.rollout.generate(ids, self._generation, seeds, self._run.state.global_step)
            except EngineError as error:
                failure = str(error)
            agree_on_failure(failure, self._groups.world)
            return redistribute(mine, self.rollout, self._groups)

    def _restart(self, failure: EngineError, place: Place) -> None:
        """A fresh engine with the policy's weights in place of the one that failed; once in a run."""
        if self._restarts:
            raise UserError(
                f"vLLM failed {failure}; it had been started anew once in this run, and stops it now: mend the cause, "
                "then resume from the last checkpoint (a limit that was too short: raise vllm_timeout)"
            ) from failure
        self._run.say(f"vLLM failed {failure}; it is started anew, once, and the round is sampled again")
        self.rollout.close()
        self.rollout = self._fresh_rollout()
        self.rollout.sleep()
        self._restarts += 1
        self._run.window.set(vllm_restarts=self._restarts)
        self.policy_changed()
        self._sync(place)

    def _score(self, completions: list[Completion], num_generations: int, place: Place) -> RewardResult:
        prompts = [completion.row["prompt"] for completion in completions]
        # Reward functions are called by the data-parallel leaders alone, reward models by every rank.
        reads = self._groups.is_dp_leader or self._rewards.models
        texts = self.texts(completions) if reads else [""] * len(completions)
        options = {"group_size": num_generations, "trainer_state": self._run.state}
        with self._run.phases("reward"):
            return self._rewards(completions, prompts, texts, **options)


def completion_seeds(seed: int, place: Place, count: int) -> list[int]:
    """A seed for each completion, from its place in the run alone: neither layout nor a resume changes it."""
    entropy = (seed, {"train": 0, "eval": 1}[place.stream], place.round, *([place.part] if place.part else []))
    return [int(word) for word in np.random.SeedSequence(entropy).generate_state(count)]
