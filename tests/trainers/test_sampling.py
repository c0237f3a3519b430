"""When weights go to the rollout engine, who is awake for what, and the seeds of completions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megalign.batch import Completion
from megalign.config import GRPOConfig
from megalign.data.rows import ROW_NUMBER
from megalign.resharding.sync import Synced
from megalign.rollout.engine import GenerationParams
from megalign.rollout.rewards import RewardResult
from megalign.trainers import sampling
from megalign.trainers.online import OnlineTrainer
from megalign.trainers.phases import Phases
from megalign.trainers.reporting import MetricsWindow
from megalign.trainers.sampling import Place, Sampling, completion_seeds


@pytest.mark.parametrize("ignored", [False, True])
def test_end_tokens_that_are_to_be_ignored_are_no_stop_tokens(ignored: bool) -> None:
    args = GRPOConfig(output_dir="unused", bf16=False, generation_kwargs={"ignore_eos": True} if ignored else None)
    trainer = SimpleNamespace(args=args, processing_class=SimpleNamespace(eos_token_id=2))
    assert OnlineTrainer.generation_params(trainer).stop_token_ids == (() if ignored else (2,))


class Recorder:
    """Stands in for an engine: writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def sleep(self) -> None:
        self.told.append(f"{self.name} sleeps")

    def wake(self, *parts: str) -> None:
        self.told.append(f"{self.name} wakes")

    def generate(self, ids: list[list[int]], params: Any, seeds: list[int], version: int) -> list[Completion]:
        self.told.append("generate")
        names = {"finish_reason": "stop", "policy_version": version}
        return [
            Completion(index=i, prompt_ids=prompt, completion_ids=[2], logprobs=[-1.0], **names)
            for i, prompt in enumerate(ids)
        ]


def sampled_thrice(monkeypatch: pytest.MonkeyPatch, *, engines_sleep: bool) -> list[str]:
    """What the engines are told while a round samples twice, as dynamic sampling does, and once more after a step."""
    told: list[str] = []
    monkeypatch.setattr(sampling, "sync_weights", lambda policy, rollout: told.append("sync") or Synced(seconds=1.0))
    monkeypatch.setattr(sampling, "redistribute", lambda completions, *rest: completions)
    args = SimpleNamespace(seed=1, engines_sleep=engines_sleep)
    run = SimpleNamespace(state=SimpleNamespace(global_step=0), phases=Phases(), window=MetricsWindow())

    class Rewards:
        models: dict[str, Any] = {}

        def __call__(self, completions: list[Completion], *rest: Any, **options: Any) -> RewardResult:
            return RewardResult(rewards=torch.ones(len(completions), 1), extra={}, metrics={})

    sample = Sampling(
        args, SimpleNamespace(is_dp_leader=False, world=SimpleNamespace(size=1)), run, policy=Recorder("policy", told),
        rollout=Recorder("rollout", told), fresh_rollout=lambda: None, rewards=Rewards(), tokenizer=None,
        generation=GenerationParams(max_tokens=1),
    )  # fmt: skip
    prompts = [
        {"prompt": "a", "prompt_ids": [1], ROW_NUMBER: 7},
        {"prompt": "b", "prompt_ids": [1, 2], ROW_NUMBER: np.int64(3)},
    ]
    first = sample(prompts, 2, Place("train", 0))
    # The number is no column of the user's, whose reward functions do not get it.
    assert [completion.row for completion in first.completions] == [{"prompt": name} for name in "aabb"]
    assert [completion.row_number for completion in first.completions] == [7, 7, 3, 3]
    # Not numpy's, of a dataset in its format: no checkpoint takes it.
    assert {type(completion.row_number) for completion in first.completions} == {int}
    sample(prompts, 2, Place("train", 0, 1))
    sample.policy_changed()
    sample(prompts, 2, Place("train", 1))
    return told


def test_an_engine_that_keeps_its_weights_is_synced_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = sampled_thrice(monkeypatch, engines_sleep=False)
    assert [one for one in told if one in ("sync", "generate")] == ["sync", "generate", "generate", "sync", "generate"]


def test_an_engine_that_sleeps_is_synced_before_each_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    told = sampled_thrice(monkeypatch, engines_sleep=True)
    assert [one for one in told if one in ("sync", "generate")] == ["sync", "generate"] * 3
    # The policy's memory is free again before completions are generated.
    for place in (place for place, one in enumerate(told) if one == "generate"):
        assert [one for one in told[:place] if one.startswith("policy")][-1] == "policy sleeps"


def test_seeds_are_a_function_of_the_place_in_the_run() -> None:
    seeds = completion_seeds(42, Place("train", 7), 16)
    assert len(set(seeds)) == 16 and min(seeds) >= 0
    assert completion_seeds(42, Place("train", 7), 8) == seeds[:8]
    others = [(43, Place("train", 7)), (42, Place("eval", 7)), (42, Place("train", 8)), (42, Place("train", 7, 1))]
    assert all(set(completion_seeds(*other, 16)).isdisjoint(seeds) for other in others)
