"""Recorded completions, padded as TRL has them and packed as we have them: what the policy losses are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalign.algos.entropy import ENTROPY_COUNTS, entropy_threshold, high_entropy_mask
from megalign.batch import Batch, Counts, Metric

NAN = float("nan")
PROMPT = 2  # tokens of every prompt
LENGTHS = (5, 1, 6, 3, 4, 2)  # completion lengths
WIDTH = max(LENGTHS)
VOCABULARY = 11
MAX_COMPLETION_LENGTH = 7
BASE: dict[str, Any] = {
    "beta": 0.0,
    "epsilon": 0.1,
    "epsilon_high": None,
    "importance_sampling_level": "token",
    "loss_type": "grpo",
    "max_completion_length": MAX_COMPLETION_LENGTH,
}


def scored(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """[..., V], [...] -> logprobs and entropy of the full vocabulary, [...] each, with their graph."""
    log_softmax = logits.log_softmax(-1)
    return {
        "logprobs": log_softmax.gather(-1, tokens[..., None]).squeeze(-1),
        "entropy": -(log_softmax.exp() * log_softmax).sum(-1),
    }


def recorded() -> dict[str, Tensor]:
    """[B, C] tensors as TRL pads them; old, reference and sampler log probabilities are off by fixed noise."""
    generator = torch.Generator().manual_seed(1)

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = (len(LENGTHS), WIDTH)
    logits = noise(1.5, *size, VOCABULARY)
    tokens = torch.randint(VOCABULARY, size, generator=generator)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[2, 2:4] = False  # a tool's answer
    mask[3] = False  # a truncated completion that is masked as a whole
    columns = scored(logits, tokens)
    return {
        "logits": logits,
        "tokens": tokens,
        **columns,
        "old_logprobs": columns["logprobs"] + noise(0.2, *size),
        "ref_logprobs": columns["logprobs"] + noise(0.3, *size),
        "rollout_logprobs": columns["logprobs"] + noise(0.4, *size),
        "loss_mask": mask,
        "advantages": noise(1.0, len(LENGTHS)),
    }


def with_graph(data: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The same data with logprobs and entropy as functions of a leaf of logits [B, C, V], and that leaf."""
    leaf = data["logits"].clone().requires_grad_()
    return data | scored(leaf, data["tokens"]), leaf


def packed(data: dict[str, Tensor], columns: Sequence[str], rows: Sequence[int] | None = None) -> Batch:
    """The rows as one packed batch with a dummy tail; what stands on prompts and tail must not matter."""
    rows = range(len(LENGTHS)) if rows is None else rows

    def flat(table: Tensor, filler: float) -> Tensor:
        pieces = []
        for row in rows:
            pieces += [table.new_full((PROMPT,), filler), table[row, : LENGTHS[row]]]
        return torch.cat([*pieces, table.new_full((3,), filler)])

    lengths = [PROMPT + LENGTHS[row] for row in rows] + [3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    token_columns = {name: flat(data[name], -50.0 - 7 * place) for place, name in enumerate(columns)}
    token_columns["loss_mask"] = flat(data["loss_mask"], False)
    return Batch(
        tokens=torch.ones(int(bounds[-1]), dtype=torch.int64),
        cu_seqlens=bounds.int(),
        num_sequences=len(rows),
        token_columns=token_columns,
        sequence_columns={"advantages": data["advantages"][list(rows)]},
    )


def outputs_of(data: dict[str, Tensor], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    columns = packed(data, ("logprobs", "entropy"), rows).token_columns
    return {"logprobs": columns["logprobs"].requires_grad_(), "entropy": columns["entropy"]}


def counts_of(data: dict[str, Tensor]) -> Counts:
    tokens = float(data["loss_mask"].sum())
    return Counts(tokens=tokens, sequences=len(LENGTHS), generation_tokens=tokens)


def trl_inputs(data: dict[str, Tensor], weights: Tensor | None) -> dict[str, Tensor]:
    shape = (len(LENGTHS), PROMPT)
    inputs = {
        "prompt_ids": torch.ones(shape, dtype=torch.int64),
        "prompt_mask": torch.ones(shape, dtype=torch.int64),
        "completion_ids": torch.ones(data["logprobs"].shape, dtype=torch.int64),
        "completion_mask": data["loss_mask"].long(),
        "advantages": data["advantages"],
        "old_per_token_logps": data["old_logprobs"],
        "ref_per_token_logps": data["ref_logprobs"],
        "sampling_per_token_logps": data["rollout_logprobs"],
        "num_items_in_batch": data["loss_mask"].sum(),
    }
    return inputs if weights is None else {**inputs, "importance_sampling_ratio": weights}


def value_of(metric: Metric) -> float:
    return metric.value.item()


def as_table(column: Tensor, data: dict[str, Tensor]) -> Tensor:
    """[T] of a whole packed batch -> [B, C] as TRL pads; 0 beyond a completion's end."""
    table = torch.zeros_like(data["logprobs"])
    start = 0
    for row, length in enumerate(LENGTHS):
        start += PROMPT
        table[row, :length] = column[start : start + length]
        start += length
    return table


def with_entropy_mask(data: dict[str, Tensor], counts: Counts, quantile: float) -> tuple[dict[str, Tensor], Counts]:
    """What a trainer adds before a step: the column, and the global count of its tokens."""
    mask = data["loss_mask"]
    threshold = entropy_threshold(data["entropy"].detach()[mask], quantile)
    data = data | {"entropy_mask": high_entropy_mask(data["entropy"].detach(), mask, threshold)}
    named = {name: float(count(packed(data, ["entropy_mask"]))) for name, count in ENTROPY_COUNTS.items()}
    assert 0 < named["entropy_tokens"] < counts.tokens
    return data, replace(counts, named=named)
