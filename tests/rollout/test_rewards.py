"""RewardRunner on real ranks: scored once, TRL's arguments, one error everywhere."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalign.batch import Completion
from megalign.config import GRPOConfig
from megalign.errors import UserError
from megalign.parallel.groups import Axis, ParallelGroups, initialize
from megalign.rollout.rewards import RewardResult, RewardRunner, distinct
from tests.ranks import run_ranks

GROUP = 2


def completions(count: int) -> list[Completion]:
    return [
        Completion(
            index=i,
            prompt_ids=[1],
            completion_ids=[i] * (i + 1),
            logprobs=[0.0] * (i + 1),
            finish_reason="stop",
            policy_version=0,
            row={"answer": 10 * i, "completion": "the dataset's own"},
        )
        for i in range(count)
    ]


def one_rank() -> ParallelGroups:
    axis = Axis(group=None, rank=0, size=1, ranks=[0])
    return ParallelGroups(world=axis, tp=axis, pp=axis, cp=axis, dp=axis, ep=axis, etp=axis, copy=axis)


def score(functions: list[Any], count: int = 4, groups: ParallelGroups | None = None, **options: Any) -> RewardResult:
    runner = RewardRunner(functions, groups or one_rank(), timeout=options.pop("timeout", 20))
    prompts = options.pop("prompts", [f"prompt {i // GROUP}" for i in range(count)])
    texts = [f"text {i}" for i in range(count)]
    return runner(completions(count), prompts, texts, group_size=GROUP, **options)


def test_names_are_trls_and_each_is_of_one_function() -> None:
    class Judge:
        def __call__(self, **kwargs: Any) -> list[float]:
            raise KeyError("no answer")

    def length(completions: list[str], factor: float, **kwargs: Any) -> list[float]:
        return [factor] * len(completions)

    def fine(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    fine.__name__ = "Judge"
    functions = [functools.partial(length, factor=1.0), Judge(), functools.partial(length, factor=2.0), Judge()]
    assert RewardRunner(functions, one_rank(), timeout=20).names == ["length", "Judge", "length_2", "Judge_2"]
    with pytest.raises(UserError, match="reward function 'Judge_2': it raised KeyError"):
        score([fine, Judge()])
    assert distinct(["f", "f_2", "f"]) == ["f", "f_2", "f_3"]


def test_what_a_function_writes_into_a_prompt_is_read_by_no_other_completion_or_model() -> None:
    def judge(prompts: list[Any], completions: list[Any], tests: list[Any], **kwargs: Any) -> list[float]:
        for prompt, completion, left in zip(prompts, completions, tests, strict=True):
            prompt.append(completion[0])
            left.pop()
        return [float(len(prompt) + 10 * len(left)) for prompt, left in zip(prompts, tests, strict=True)]

    prompt, row = [{"role": "user", "content": "Why?"}], {"tests": [1, 2, 3]}
    given = completions(4)
    for completion in given:
        completion.row = row
    runner = RewardRunner([judge], one_rank(), timeout=20)
    found = runner(given, [prompt] * 4, ["text"] * 4, group_size=GROUP)
    assert found.rewards.flatten().tolist() == [22.0] * 4
    assert len(prompt) == 1 and row == {"tests": [1, 2, 3]}


def test_functions_get_trls_arguments() -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        return [0.0] * len(prompts)

    score([spy], trainer_state="the state")
    assert seen["prompts"] == ["prompt 0", "prompt 0", "prompt 1", "prompt 1"]
    assert seen["completions"] == ["text 0", "text 1", "text 2", "text 3"]
    assert seen["completion_ids"] == [[0], [1, 1], [2, 2, 2], [3, 3, 3, 3]]
    assert seen["answer"] == [0, 10, 20, 30]
    assert seen["trainer_state"] == "the state"
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric",
    }  # fmt: skip
    score([spy], prompts=[[{"role": "user", "content": "hi"}]] * 4)
    assert seen["completions"][1] == [{"role": "assistant", "content": "text 1"}]


def test_none_is_nan_and_functions_are_columns() -> None:
    result = score([lambda answer, **_: [None, 1, True, 2.5], "length_reward", lambda **_: np.arange(4)])
    assert result.rewards.dtype == torch.float32 and result.rewards.shape == (4, 3)
    assert math.isnan(result.rewards[0, 0]) and result.rewards[1:, 0].tolist() == [1.0, 1.0, 2.5]
    assert result.rewards[:, 1].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert result.rewards[:, 2].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_numpys_and_torchs_numbers_are_numbers() -> None:
    numbers = [np.bool_(True), np.float32(0.5), torch.tensor(2), torch.tensor(-1.5)]
    assert score([lambda **_: numbers]).rewards.flatten().tolist() == [1.0, 0.5, 2.0, -1.5]


def test_a_function_that_changes_its_ids_changes_no_completion() -> None:
    made = completions(2)
    runner = RewardRunner([lambda completion_ids, **_: [ids.pop() for ids in completion_ids]], one_rank(), timeout=20)
    assert runner(made, ["a", "a"], ["b", "c"], group_size=2).rewards.flatten().tolist() == [0.0, 1.0]
    assert [completion.completion_ids for completion in made] == [[0], [1, 1]]


def test_async_functions_run_together() -> None:
    together: list[asyncio.Barrier] = []  # of the loop that runs them

    async def slow(prompts: list[str], **kwargs: Any) -> list[float]:
        if not together:
            together.append(asyncio.Barrier(3))
        await together[0].wait()
        return [1.0] * len(prompts)

    class Judge:
        async def __call__(self, prompts: list[str], **kwargs: Any) -> list[float]:
            return await slow(prompts)

    result = score([slow, Judge(), lambda prompts, **_: [0.0] * len(prompts), slow])
    assert result.rewards.tolist() == [[1.0, 1.0, 0.0, 1.0]] * 4


def raises(**kwargs: Any) -> list[float]:
    raise KeyError("no such\ncolumn")


def hangs(**kwargs: Any) -> list[float]:
    time.sleep(1000)
    return []


async def hangs_async(**kwargs: Any) -> list[float]:
    await asyncio.sleep(1000)
    return []


def one_too_few(prompts: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * (len(prompts) - 1)


def words(prompts: list[str], **kwargs: Any) -> list[Any]:
    return [0.0, "good"] * (len(prompts) // 2)


def infinite(prompts: list[str], **kwargs: Any) -> list[float]:
    return [math.inf] * len(prompts)


def leaves(**kwargs: Any) -> list[float]:
    raise SystemExit(0)


def nothing(**kwargs: Any) -> None:
    return None


def logs_too_few(log_extra: Callable[[str, list[int]], None], **kwargs: Any) -> list[float]:
    log_extra("column", [1])
    return []


BROKEN = [
    (raises, ["'raises'", "KeyError", "no such", "test_rewards.py"]),
    (hangs, ["'hangs'", "for completions 0 to 3 of the round", "reward_timeout 1 s"]),
    (hangs_async, ["'hangs_async'", "reward_timeout 1 s"]),
    (one_too_few, ["'one_too_few'", "3 values for 4 completions"]),
    (words, ["'words'", "'good'", "completion 1"]),
    (infinite, ["'infinite'", "inf"]),
    (leaves, ["'leaves'", "ended its thread"]),
    (nothing, ["'nothing'", "NoneType"]),
    (logs_too_few, ["'logs_too_few'", "log_extra('column') has 1 values for 4"]),
]


@pytest.mark.parametrize(("function", "expected"), BROKEN, ids=[function.__name__ for function, _ in BROKEN])
def test_a_broken_function_is_named_in_one_line(function: Any, expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        score(["length_reward", function], timeout=1 if function in (hangs, hangs_async) else 20)
    assert all(word in str(error.value) for word in expected), str(error.value)
    assert "\n" not in str(error.value)


def test_reward_models_and_empty_lists_are_refused() -> None:
    with pytest.raises(UserError, match="Linear is a model object; name its directory"):
        RewardRunner([torch.nn.Linear(1, 1)], one_rank(), timeout=1)
    with pytest.raises(UserError, match="no reward function"):
        RewardRunner([], one_rank(), timeout=1)


CALLS: list[list[int]] = []


def counted(completion_ids: list[list[int]], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
    indices = [ids[0] for ids in completion_ids]
    CALLS.append(indices)
    log_extra("index", indices)
    if 0 in indices:
        log_extra("first", ["yes"] * len(indices))
    log_metric("index", sum(indices) / len(indices))
    return [float(index) for index in indices]


def only_the_first(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    if completion_ids[0] == [0]:
        raise RuntimeError("the judge is out of money")
    return [0.0] * len(completion_ids)


def score_on_ranks(tp: int, pp: int, count: int) -> dict[str, Any]:
    groups = initialize(GRPOConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    CALLS.clear()
    result = score([counted], count, groups)
    told = {"result": result, "calls": list(CALLS), "errors": []}
    for function, timeout in ((only_the_first, 20), (hangs, 1)):
        try:
            score([function], count, groups, timeout=timeout)
        except UserError as error:
            told["errors"].append(str(error))
    dist.barrier()  # nobody is left behind in a collective
    return told


# Two leaders; two with uneven shares; one leader for four ranks; two leaders and one group.
@pytest.mark.parametrize(("tp", "pp", "count"), [(2, 1, 8), (1, 2, 6), (2, 2, 4), (1, 2, 2)])
def test_each_completion_is_scored_once_in_the_job(tp: int, pp: int, count: int) -> None:
    ranks = run_ranks(4, score_on_ranks, tp, pp, count)
    calls = sorted(call for rank in ranks for call in rank["calls"])
    assert [index for call in calls for index in call] == list(range(count))
    assert all(len(call) % GROUP == 0 and call[0] % GROUP == 0 for call in calls), "groups stay whole"
    assert len(calls) == min(4 // (tp * pp), count // GROUP)
    for rank in ranks:
        result = rank["result"]
        assert result.rewards.tolist() == [[float(i)] for i in range(count)]
        assert result.extra["index"] == list(range(count))
        in_first = len(calls[0])
        assert result.extra["first"] == ["yes"] * in_first + [None] * (count - in_first)
        assert result.metrics == {"index": pytest.approx((count - 1) / 2)}  # also of shares that are not equal
        assert "out of money" in rank["errors"][0]
        late = f"reward function 'hangs' did not answer for completions 0 to {in_first - 1} of the round within "
        assert rank["errors"][1].startswith(late) and "\n" not in rank["errors"][1]
        assert rank["errors"] == ranks[0]["errors"]
