"""RewardRunner: every completion scored exactly once in the job, whole groups at a time, under a time limit.

A reward function may be a paid judge, so it runs on the data-parallel leaders only; every rank gets the
result, and every rank raises the same error when one fails.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import math
import numbers
import threading
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megalign.batch import Completion
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups
from megalign.rollout.reward_functions import RewardFunction, resolve

# What TRL keeps from reward functions, since they get it under another name.
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
_LARGEST = torch.finfo(torch.float32).max  # rewards are fp32, in which a larger one would be inf


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """What the reward functions said of all completions of the job; equal on every rank."""

    rewards: Tensor  # [num_completions, num_functions] float32, NaN where a function does not apply
    extra: dict[str, list[Any]]  # log_extra: a value for each completion, None where none was given
    metrics: dict[str, float]  # log_metric: the mean of what was reported, by the completions of each call


@dataclass
class _Share:
    """What one leader has to tell the others."""

    first: int = 0  # index of its first completion
    count: int = 0
    rewards: list[list[float]] = field(default_factory=list)  # one list for each function
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None


class RewardRunner:
    """Calls reward functions with TRL's arguments; sync ones in turn, async ones together."""

    def __init__(self, reward_funcs: Sequence[str | RewardFunction], groups: ParallelGroups, *, timeout: float) -> None:
        if not reward_funcs:
            raise UserError("no reward function was given; pass reward_funcs, for example length_reward")
        self.functions = [resolve(func) if isinstance(func, str) else _callable(func) for func in reward_funcs]
        self.names = distinct([_name(func) for func in self.functions])
        self._groups = groups
        self._timeout = timeout

    def __call__(
        self,
        completions: list[Completion],
        prompts: list[Any],
        texts: list[str],
        *,
        group_size: int,
        trainer_state: Any = None,
    ) -> RewardResult:
        """Scores the job's completions, which every rank holds; prompts[i], texts[i] belong to one.

        A prompt that is a list of messages gets its completion as one assistant message, otherwise as text.
        The completions' `row` gives the columns.
        """
        assert len(completions) == len(prompts) == len(texts), "a prompt and a text for each completion"
        assert len(completions) % group_size == 0, f"{len(completions)} completions in groups of {group_size}"
        share = _Share()
        if self._groups.is_dp_leader:
            num_groups, dp = len(completions) // group_size, self._groups.dp
            first = num_groups * dp.rank // dp.size * group_size
            last = num_groups * (dp.rank + 1) // dp.size * group_size
            share = _Share(first=first, count=last - first)
            if share.count:
                mine = slice(first, last)
                arguments = _arguments(completions[mine], prompts[mine], texts[mine])
                self._score(arguments | {"trainer_state": trainer_state}, share)
        return self._merge(self._gather(share))

    def _score(self, arguments: dict[str, Any], share: _Share) -> None:
        """Fills the share, in a thread that is left behind when the time is over."""
        scoring = _Scoring(self.functions, self.names, arguments, share.count)
        thread = threading.Thread(target=scoring.run, name="rewards", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            share.error = (
                f"reward function {scoring.unfinished()} did not answer for completions {share.first} to "
                f"{share.first + share.count - 1} of the round within reward_timeout {self._timeout:g} s; make it "
                "faster or raise reward_timeout"
            )
        elif scoring.error is not None:
            share.error = scoring.error
        elif None in scoring.rewards:  # SystemExit and the like end a thread without a word
            share.error = f"reward function {scoring.unfinished()} ended its thread; it must return its rewards"
        else:
            share.rewards, share.extra, share.metrics = scoring.rewards, scoring.extra, scoring.metrics

    def _gather(self, share: _Share) -> list[_Share]:
        """All leaders' shares on every rank, in order of completions."""
        shares: list[Any] = [share]
        if self._groups.world.size > 1:
            shares = [None] * self._groups.world.size
            dist.all_gather_object(shares, share, group=self._groups.world.group)
        for told in shares:
            if told.error is not None:
                raise UserError(told.error)
        return sorted((told for told in shares if told.count), key=lambda told: told.first)

    def _merge(self, shares: list[_Share]) -> RewardResult:
        rewards = [torch.tensor(share.rewards, dtype=torch.float32).T for share in shares]
        columns = list(dict.fromkeys(column for share in shares for column in share.extra))
        names = list(dict.fromkeys(name for share in shares for name in share.metrics))
        return RewardResult(
            rewards=torch.cat(rewards) if rewards else torch.empty(0, len(self.functions)),
            extra={
                column: [value for share in shares for value in share.extra.get(column, [None] * share.count)]
                for column in columns
            },
            metrics={name: _mean_of_reports(name, shares) for name in names},
        )


def _mean_of_reports(name: str, shares: Sequence[_Share]) -> float:
    """Each counts as many completions as its call had, so that a mean over those is one over all of the job's."""
    reports = [(value, share.count) for share in shares for value in share.metrics.get(name, [])]
    return sum(value * count for value, count in reports) / sum(count for _, count in reports)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, the second of a kind as name_2 and so on: each is a metric and a column of its own."""
    found: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        found.append(next(candidate for candidate in candidates if candidate not in found))
    return found


class _Scoring:
    """One pass of all functions over one leader's completions; `run` is the thread's body."""

    def __init__(
        self, functions: list[RewardFunction], names: list[str], arguments: dict[str, Any], count: int
    ) -> None:
        self.functions, self.names, self.count = functions, names, count
        self.arguments = arguments | {"log_extra": self._log_extra, "log_metric": self._log_metric}
        self.rewards: list[Any] = [None] * len(functions)
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}
        self.error: str | None = None
        self._running: dict[int, str] = {}

    def run(self) -> None:
        """Sync functions in turn, then all async ones on one loop; stops at the first error."""
        concurrent = [i for i, function in enumerate(self.functions) if _is_async(function)]
        for i in range(len(self.functions)):
            if i not in concurrent and self.error is None:
                self._call(i)
        if concurrent and self.error is None:
            asyncio.run(self._call_together(concurrent))

    def unfinished(self) -> str:
        """Names of the functions that are still at work."""
        return ", ".join(repr(name) for name in list(self._running.values()))

    def _call(self, i: int) -> None:
        self._running[i] = self.names[i]
        try:
            self._accept(i, self.functions[i](**self.arguments))
        except Exception as error:  # whatever a user's function raises must reach every rank, or they hang
            self._fail(i, error)
        del self._running[i]

    async def _call_together(self, indices: list[int]) -> None:
        await asyncio.gather(*(self._call_async(i) for i in indices))

    async def _call_async(self, i: int) -> None:
        self._running[i] = self.names[i]
        try:
            self._accept(i, await self.functions[i](**self.arguments))
        except Exception as error:  # as in _call
            self._fail(i, error)
        del self._running[i]

    def _fail(self, i: int, error: Exception) -> None:
        if isinstance(error, UserError):
            text = str(error)
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error} at {frame.filename}:{frame.lineno}"
            text = f"it raised {told}; it must return a number or None for each completion"
        self.error = self.error or " ".join(f"reward function {self.names[i]!r}: {text}".split())

    def _accept(self, i: int, values: Any) -> None:
        """Checks what a function returned; None becomes NaN."""
        if hasattr(values, "tolist"):  # numpy and torch
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise UserError(f"it returned {type(values).__name__}; return a list of {self.count} numbers (or None)")
        if len(values) != self.count:
            raise UserError(
                f"it returned {len(values)} values for {self.count} completions; return one for each, None "
                "where it does not apply"
            )
        self.rewards[i] = [_number(index, value) for index, value in enumerate(values)]

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self.count:
            raise UserError(
                f"log_extra({column!r}) has {len(values)} values for {self.count} completions; give one for each"
            )
        self.extra[column] = list(values)

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))


def _arguments(completions: list[Completion], prompts: list[Any], texts: list[str]) -> dict[str, Any]:
    """TRL's keyword arguments of a reward function; dataset columns are lists.

    Each completion has a prompt and values of its own, as in TRL: a function may write into them, and neither the
    other completions of the prompt nor a reward model reads that.
    """
    columns = dict.fromkeys(name for completion in completions for name in completion.row if name not in _NOT_COLUMNS)
    return {
        **{name: [deepcopy(completion.row.get(name)) for completion in completions] for name in columns},
        "prompts": [deepcopy(prompt) for prompt in prompts],
        "completions": [_conversational(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        "completion_ids": [list(completion.completion_ids) for completion in completions],
    }


def _conversational(prompt: Any, text: str) -> Any:
    if isinstance(prompt, str):
        return text
    return [{"role": "assistant", "content": text}]


def _number(index: int, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, np.generic | torch.Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or abs(value) > _LARGEST:
        raise UserError(
            f"it returned {value!r} for completion {index}; return a finite number of fp32, or None where it does not "
            "apply"
        )
    return float(value)


def _callable(function: Any) -> RewardFunction:
    if isinstance(function, torch.nn.Module):
        raise UserError(
            f"reward function {type(function).__name__} is a model object; name its directory, a "
            "*ForSequenceClassification, of which each rank reads its own slices"
        )
    if not callable(function):
        raise UserError(f"reward function {function!r} is neither a function nor a name; give one of them")
    return function


def _name(function: Callable[..., Any]) -> str:
    """TRL's: of a functools.partial what it wraps, of a callable object its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
