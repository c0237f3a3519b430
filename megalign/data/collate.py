"""From sequences and completions to one packed Batch. Where tokens, masks and columns get their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megalign.batch import Batch, Completion
from megalign.data.balance import Budget, Unit, balanced, imbalance, units_of
from megalign.data.prefixes import common_beginnings
from megalign.data.sampler import shard

if TYPE_CHECKING:
    from megalign.parallel.groups import ParallelGroups


def pack(sequences: Sequence[Mapping[str, Any]], *, multiple: int = 1, sequence_multiple: int = 1) -> Batch:
    """Sequences -> one Batch; none -> a dummy batch of `multiple` tokens.

    Each has `tokens` and `loss_mask` (all True when absent), and may have more: a list is a token column, a
    number a sequence column (float32 both). The first token of a sequence is never in the loss. Each
    sequence is padded to `sequence_multiple`, the pads being its last, masked tokens; the whole to
    `multiple` by a dummy sequence of its own.
    """
    assert multiple % sequence_multiple == 0, f"multiple {multiple}, sequence_multiple {sequence_multiple}"
    if not sequences:
        return Batch.dummy(multiple)
    token_names, sequence_names = _column_names(sequences[0])
    for sequence in sequences:
        _check(sequence, token_names)
    lengths = [_rounded_up(len(sequence["tokens"]), sequence_multiple) for sequence in sequences]
    total = _rounded_up(sum(lengths), multiple)
    tail = [total - sum(lengths)] if total > sum(lengths) else []

    columns = {
        name: _joined([sequence[name] for sequence in sequences], lengths, total, torch.float32) for name in token_names
    }
    masks = [_loss_mask(sequence) for sequence in sequences]
    tokens = _joined([sequence["tokens"] for sequence in sequences], lengths, total, torch.int64)
    return Batch(
        tokens=tokens,
        shared=common_beginnings(tokens[: sum(lengths)], lengths),
        cu_seqlens=torch.tensor([0, *lengths, *tail]).cumsum(0).int(),
        num_sequences=len(sequences),
        unpadded_lengths=torch.tensor([len(sequence["tokens"]) for sequence in sequences]),
        token_columns={"loss_mask": _joined(masks, lengths, total, torch.bool), **columns},
        sequence_columns={
            name: torch.tensor([float(sequence[name]) for sequence in sequences]) for name in sequence_names
        },
    )


def unpack(batch: Batch) -> list[dict[str, Any]]:
    """The sequences of a Batch, as `pack` takes them, without their pads."""
    lengths = batch.lengths if batch.unpadded_lengths is None else batch.unpadded_lengths
    columns = {"tokens": batch.tokens, **batch.token_columns}
    return [
        {
            **{name: column[start : start + length] for name, column in columns.items()},
            **{name: float(column[number]) for name, column in batch.sequence_columns.items()},
        }
        for number, (start, length) in enumerate(zip(batch.cu_seqlens.tolist(), lengths.tolist(), strict=False))
    ]


class Share(NamedTuple):
    """What a data-parallel rank has of a global batch."""

    microbatches: list[tuple[list[int], Batch]]  # each behind its rows
    imbalance: float | None  # of all ranks, where rows were dealt out by cost: balance.imbalance


def packed_share(
    rows: Sequence[int],
    sequences_of: Callable[[list[int]], Sequence[Mapping[str, Any]]],
    groups: ParallelGroups,
    *,
    micro_batch: int,
    budget: Budget | None = None,
) -> Share:
    """This data-parallel rank's packed microbatches of one global batch, each behind its rows: of `micro_batch` rows,
    or by a budget of tokens.

    `sequences_of` gives the sequences of some of the rows, a row's own as neighbours. A rank without rows has one
    dummy microbatch, since every rank has to take part in the step.
    """
    unevenness = None
    if budget is None:
        parts = shard(rows, dp_rank=groups.dp.rank, dp_size=groups.dp.size, micro_batch=micro_batch)
    else:
        # The pads of `pack` count: a microbatch that is padded to the multiple is not larger than the budget. What
        # prefixes spare is rounded to it as well, the other way.
        multiple = groups.token_multiple
        spared = multiple if budget.shares_prefixes and multiple > 1 else 0
        whole = max(1, budget.tokens // multiple * multiple - spared)
        budget = replace(budget, tokens=whole)
        units = _units(rows, sequences_of, budget, groups.sequence_multiple)
        dealt = balanced(units, groups.dp.size, budget)
        unevenness = imbalance(units, dealt)
        parts = [[rows[number] for number in part] for part in dealt[groups.dp.rank]]
    sizes = {"multiple": groups.token_multiple, "sequence_multiple": groups.sequence_multiple}
    return Share([(part, pack(sequences_of(part), **sizes)) for part in parts], unevenness)


def _units(
    rows: Sequence[int],
    sequences_of: Callable[[list[int]], Sequence[Mapping[str, Any]]],
    budget: Budget,
    sequence_multiple: int,
) -> list[Unit]:
    sequences = [sequences_of([row]) for row in rows]
    lengths = [[_rounded_up(len(sequence["tokens"]), sequence_multiple) for sequence in own] for own in sequences]
    if not budget.shares_prefixes:
        return units_of(lengths, [[0] * len(own) for own in lengths], budget)
    tokens = [torch.as_tensor(sequence["tokens"]) for own in sequences for sequence in own]
    common = iter(common_beginnings(torch.cat(tokens), [len(part) for part in tokens]) if tokens else ())
    return units_of(lengths, [[next(common) for _ in own] for own in lengths], budget)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _column_names(sequence: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    others = [name for name in sequence if name not in ("tokens", "loss_mask")]
    is_token_column = {name: isinstance(sequence[name], (Sequence, Tensor)) for name in others}
    return [name for name in others if is_token_column[name]], [name for name in others if not is_token_column[name]]


def _check(sequence: Mapping[str, Any], token_names: Sequence[str]) -> None:
    length = len(sequence["tokens"])
    assert length > 0, "a sequence has at least one token"
    for name in token_names:
        assert len(sequence[name]) == length, f"{name}: {len(sequence[name])} values for {length} tokens"


def _loss_mask(sequence: Mapping[str, Any]) -> Tensor:
    length = len(sequence["tokens"])
    mask = torch.as_tensor(sequence.get("loss_mask", [True] * length), dtype=torch.bool).clone()
    assert len(mask) == length, f"loss_mask: {len(mask)} values for {length} tokens"
    mask[0] = False  # nothing predicts it
    return mask


def _joined(values: Sequence[Any], lengths: Sequence[int], total: int, dtype: torch.dtype) -> Tensor:
    """Each at its sequence's place, zeros (False) between and behind."""
    column = torch.zeros(total, dtype=dtype)
    start = 0
    for value, length in zip(values, lengths, strict=True):
        column[start : start + len(value)] = torch.as_tensor(value, dtype=dtype)
        start += length
    return column


def completion_sequence(completion: Completion, *, mask_truncated_completions: bool) -> dict[str, list[Any]]:
    """Prompt and completion as one sequence, with the sampler's logprobs where the sampler chose the token.

    The loss covers the tokens of `completion_mask`; none of a completion that was cut for its length, when
    `mask_truncated_completions`.
    """
    prompt = len(completion.prompt_ids)
    cut = mask_truncated_completions and completion.finish_reason == "length"
    mask = [False] * len(completion.completion_ids) if cut else completion.completion_mask
    return {
        "tokens": completion.prompt_ids + completion.completion_ids,
        "loss_mask": [False] * prompt + mask,
        "rollout_logprobs": [0.0] * prompt + completion.logprobs,
    }


def completion_sequences(
    completions: Sequence[Completion], *, mask_truncated_completions: bool, temperature: float | None = None
) -> list[dict[str, Any]]:
    """Completions as `pack` takes them, with token columns loss_mask and rollout_logprobs (0 on prompts).

    Sequence columns: `index`, a completion's place in the job; `ended`, 1 if it came to its end by itself; and
    `temperature` (the sampler's) when given.
    """
    heat = {} if temperature is None else {"temperature": temperature}
    return [
        {
            **completion_sequence(completion, mask_truncated_completions=mask_truncated_completions),
            "index": completion.index,
            "ended": completion.finish_reason == "stop",
            **heat,
        }
        for completion in completions
    ]
