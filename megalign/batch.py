"""What travels through the house: Batch (always packed), Completion, Slice, Counts, Metric. Torch only.

Shape legend: T tokens of a packed microbatch, S its real sequences, H hidden size, V vocabulary.
A token column speaks of the token at its own index: logprobs[t] = log p(tokens[t] | earlier tokens of the
same sequence), and loss_mask[t] says whether tokens[t] counts. The first token of a sequence has logprob 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class HostLengths(NamedTuple):
    """Of all sequences of a batch, the dummy tail included."""

    whole: tuple[int, ...]
    unpadded: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed microbatch. Phases add columns; none changes one.

    `cu_seqlens` covers T exactly. When it holds one sequence more than `num_sequences`, the last is a dummy
    that fills T up to the multiple which the layout needs; its mask is False everywhere.
    """

    tokens: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] or, with the dummy tail, [S + 2]; int32
    num_sequences: int  # S
    unpadded_lengths: Tensor | None = None  # [S] int64, where sequences have pads at their ends
    token_columns: Mapping[str, Tensor] = field(default_factory=dict)  # [T] each
    sequence_columns: Mapping[str, Tensor] = field(default_factory=dict)  # [S] each
    rows: tuple[int, ...] = ()  # of the user's dataset, where they are known: for what is said about the batch
    shared: tuple[int, ...] = ()  # tokens that each sequence begins with as the one before it (data/prefixes.py)

    def __post_init__(self) -> None:
        for name, column in self.token_columns.items():
            assert column.shape == self.tokens.shape, f"token column {name}: {tuple(column.shape)}"
        for name, column in self.sequence_columns.items():
            assert column.shape == (self.num_sequences,), f"sequence column {name}: {tuple(column.shape)}"

    def __getitem__(self, name: str) -> Tensor:
        return self.token_columns[name] if name in self.token_columns else self.sequence_columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.token_columns or name in self.sequence_columns

    def with_token_columns(self, **columns: Tensor) -> Batch:
        """The same batch with more [T] columns; a column is never replaced."""
        self._check_new(columns)
        return replace(self, token_columns={**self.token_columns, **columns})

    def with_sequence_columns(self, **columns: Tensor) -> Batch:
        """The same batch with more [S] columns; a column is never replaced."""
        self._check_new(columns)
        return replace(self, sequence_columns={**self.sequence_columns, **columns})

    def _check_new(self, columns: Mapping[str, Tensor]) -> None:
        clash = [name for name in columns if name in self]
        assert not clash, f"columns {clash} are already in the batch"

    @property
    def num_tokens(self) -> int:
        """T, the dummy tail included: all tokens that the model is fed."""
        return self.tokens.numel()

    @property
    def lengths(self) -> Tensor:
        """[S] length of each real sequence (int64)."""
        return self.cu_seqlens.diff()[: self.num_sequences].long()

    @cached_property
    def host_lengths(self) -> HostLengths:
        """On the host: asking a device for them waits for all that it was given to do."""
        whole = self.cu_seqlens.diff().tolist()
        own = whole if self.unpadded_lengths is None else self.unpadded_lengths.tolist()
        return HostLengths(tuple(whole), (*own, *whole[len(own) :]))

    @property
    def sequence_ids(self) -> Tensor:
        """[T] index of the sequence a token belongs to; the dummy tail has index S."""
        lengths = self.cu_seqlens.diff().long()
        numbers = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(numbers, lengths, output_size=self.num_tokens)  # which a GPU would be asked for

    @property
    def is_padding(self) -> Tensor:
        """[T] where a token is nobody's: behind a sequence's own, or in the dummy tail."""
        lengths = self.lengths if self.unpadded_lengths is None else self.unpadded_lengths
        own = torch.cat([lengths, lengths.new_zeros(1)])[self.sequence_ids]
        starts = self.cu_seqlens.long()[self.sequence_ids]
        return torch.arange(self.num_tokens, device=self.tokens.device) - starts >= own

    def per_sequence_sum(self, column: Tensor) -> Tensor:
        """[T] -> [S], the sum of a token column over each real sequence; differentiable.

        Added up in float64: of thousands of tokens the order, which a GPU does not keep, would show in fp32.
        """
        exact = column.double() if column.is_floating_point() else column
        sums = exact.new_zeros(self.num_sequences + 1).index_add(0, self.sequence_ids, exact)
        return sums[: self.num_sequences].to(column.dtype)

    def per_token(self, column: Tensor) -> Tensor:
        """[S] -> [T], a sequence's value at each of its tokens; 0 on the dummy tail; differentiable."""
        padded = torch.cat([column, column.new_zeros(1)])
        return padded[self.sequence_ids]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; what the host knows of it is not asked for there."""
        moved = replace(
            self,
            tokens=self.tokens.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            unpadded_lengths=None if self.unpadded_lengths is None else self.unpadded_lengths.to(device),
            token_columns={name: column.to(device) for name, column in self.token_columns.items()},
            sequence_columns={name: column.to(device) for name, column in self.sequence_columns.items()},
        )
        vars(moved)["host_lengths"] = self.host_lengths
        return moved

    @classmethod
    def dummy(cls, num_tokens: int) -> Batch:
        """A batch without a real sequence: what a rank feeds when it has no rows left."""
        return cls(
            tokens=torch.zeros(num_tokens, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
            num_sequences=0,
            token_columns={"loss_mask": torch.zeros(num_tokens, dtype=torch.bool)},
        )


@dataclass(kw_only=True)
class Completion:
    """One sampled answer, with all that later phases need to know of it."""

    index: int  # its place in the job's list of prompts
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]  # the sampler's, one for each completion token
    finish_reason: Literal["stop", "length"]
    policy_version: int  # optimizer steps taken by the policy that sampled it
    completion_mask: list[bool] = field(default_factory=list)  # False where a tool wrote the token
    row: Mapping[str, Any] = field(default_factory=dict)  # the dataset row's other columns
    row_number: int | None = None  # in the user's dataset

    def __post_init__(self) -> None:
        if not self.completion_mask:
            self.completion_mask = [True] * len(self.completion_ids)


class Slice(NamedTuple):
    """A part of one Hugging Face tensor: the only currency between a Megatron model and the outside."""

    hf_name: str
    full_shape: tuple[int, ...]
    index: tuple[int | slice, ...]  # where `tensor` stands in the whole
    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Global counts of one optimizer step: over all microbatches and data-parallel ranks."""

    tokens: float  # loss tokens
    sequences: float
    generation_tokens: float = float("nan")  # GRPO's dapo: loss tokens of the whole generation batch, a step's share
    named: Mapping[str, float] = field(default_factory=dict)  # what else a loss divides by; its module says how

    def __getitem__(self, name: str) -> float:
        return self.named[name]


class Metric(NamedTuple):
    """A microbatch's share of a metric; `sum` shares are already divided by a global count."""

    value: Tensor
    reduce: Literal["sum", "min", "max"] = "sum"
