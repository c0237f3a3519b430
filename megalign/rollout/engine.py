"""What a rollout engine is, and the context in which an engine holds its memory. Imports no engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from megalign.batch import Completion


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """How to sample; TRL's names and defaults."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float | None = None
    repetition_penalty: float = 1.0
    structured_outputs_regex: str | None = None
    stop_token_ids: tuple[int, ...] = ()  # the tokenizer's eos; generation_config.json adds the model's
    extra: Mapping[str, Any] = field(default_factory=dict)  # `generation_kwargs`: the engine's own names


class RolloutEngine(Protocol):
    """Every method is called on every rank, in the same order, with equal arguments."""

    num_replicas: int  # replicas are runs of consecutive ranks of equal length

    def generate(
        self, prompts: list[list[int]], params: GenerationParams, seeds: list[int], policy_version: int
    ) -> list[Completion]:
        """Completes this replica's contiguous share of the job's `prompts`; prompt i draws from `seeds[i]`.

        Every rank of a replica gets the same completions, each with its place among all prompts. EngineError
        (failing.py) when there are none.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes whole Hugging Face tensors; the stream is consumed to its end on every rank.

        A tensor must keep its memory until its layer is complete, so a stream may not reuse its buffers.
        """
        ...

    def sleep(self) -> None:
        """Lets go of weights and KV cache; both are lost."""
        ...

    def wake(self, *tags: str) -> None:
        """Takes back memory for "weights", "kv_cache", or (no tag) both; weights must then be updated."""
        ...

    def close(self) -> None:
        """Lets go of everything, also after an EngineError; nothing may be called after it."""
        ...


class Sleeper(Protocol):
    """What `awake` needs; both engines have it."""

    def sleep(self) -> None: ...

    def wake(self, *tags: str) -> None: ...


EngineT = TypeVar("EngineT", bound=Sleeper)


@contextmanager
def awake(engine: EngineT, *tags: str) -> Iterator[EngineT]:
    """The engine awake inside the block, asleep after it.

    With tags, a first stage of waking: what they name stays awake for the block that follows, since weights
    which were just synchronised would otherwise be lost. An error leaves the engine as it is: the job ends.
    """
    engine.wake(*tags)
    yield engine
    if not tags:
        engine.sleep()
