"""Recorded per-token numbers of a few sequences: as tables, the way TRL pads them, and as packed batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.batch import Batch, Counts, Metric

FILLER = -50.0  # stands where the loss mask is False, and must not matter
TAIL = 3  # tokens of the dummy tail


@dataclass(frozen=True)
class Recorded:
    """S sequences: prompts of some lengths, completions in tables [S, W]; "loss_mask" is True on what counts."""

    prompts: tuple[int, ...]
    tables: Mapping[str, Tensor]
    sequence_columns: Mapping[str, Tensor]  # [S] each

    @property
    def lengths(self) -> list[int]:
        """The completion tokens of each sequence, those that do not count among them."""
        width = self.tables["loss_mask"].shape[1]
        return [width - row % 3 for row in range(len(self.prompts))]

    def packed(self, rows: Sequence[int] | None = None) -> Batch:
        """The rows as one packed batch with a dummy tail, every table a token column."""
        rows = range(len(self.prompts)) if rows is None else rows
        lengths = [self.prompts[row] + self.lengths[row] for row in rows] + [TAIL]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return Batch(
            tokens=torch.ones(int(bounds[-1]), dtype=torch.int64),
            cu_seqlens=bounds.int(),
            num_sequences=len(rows),
            token_columns={name: self.flat(table, rows) for name, table in self.tables.items()},
            sequence_columns={name: column[list(rows)] for name, column in self.sequence_columns.items()},
        )

    def flat(self, table: Tensor, rows: Sequence[int]) -> Tensor:
        """[S, W] -> [T] of the rows; False or FILLER off the loss mask."""
        filler = False if table.dtype == torch.bool else FILLER
        table = table.masked_fill(~self.tables["loss_mask"], filler)
        pieces = []
        for row in rows:
            pieces += [table.new_full((self.prompts[row],), filler), table[row, : self.lengths[row]]]
        return torch.cat([*pieces, table.new_full((TAIL,), filler)])

    def table_of(self, column: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """[T] of the rows -> [S, W], 0 beyond a completion's end and for other rows."""
        table, start = column.new_zeros(self.tables["loss_mask"].shape), 0
        for row in range(len(self.prompts)) if rows is None else rows:
            length = self.lengths[row]
            start += self.prompts[row] + length
            table[row, :length] = column[start - length : start]
        return table


def recorded(num_sequences: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Recorded:
    """Random numbers, the reference off the policy everywhere, one completion with a hole (a tool's answer)."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_sequences, 7)

    def noise(scale: float) -> Tensor:
        return (scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)

    mask = torch.arange(size[1]) < torch.tensor([size[1] - row % 3 for row in range(num_sequences)])[:, None]
    mask[1, 2:4] = False
    mask[0, 6] = mask[4:5, 3:6] = False
    logprobs = -noise(1.0).abs()
    tables = {
        "loss_mask": mask,
        "logprobs": logprobs,
        "ref_logprobs": logprobs + noise(0.6),
        "entropy": noise(1.0).abs(),
        "mean_logits": noise(1.0),
        "log_sum_squares": -noise(1.0).abs(),
        "argmax_correct": (noise(1.0) > 0).to(dtype),
    }
    return Recorded(tuple(1 + row // 2 % 3 for row in range(num_sequences)), tables, {})


def outputs_of(data: Recorded, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The engine's columns for the rows, logprobs a leaf."""
    batch = data.packed(rows)
    names = ("logprobs", "entropy", "mean_logits", "log_sum_squares", "argmax_correct")
    outputs = {name: batch[name].clone() for name in names}
    outputs["logprobs"].requires_grad_()
    return outputs


def counts_of(batches: Sequence[Batch], functions: Mapping[str, Callable[[Batch], Tensor]]) -> Counts:
    """The step's counts, as a trainer adds them up."""
    return Counts(
        tokens=float(sum(batch["loss_mask"].sum() for batch in batches)),
        sequences=float(sum(batch.num_sequences for batch in batches)),
        named={name: float(sum(count(batch) for batch in batches)) for name, count in functions.items()},
    )


def silent_outputs(num_tokens: int = 4) -> dict[str, Tensor]:
    """The engine's columns for `Batch.dummy`; what stands in them must not matter."""
    names = ("entropy", "mean_logits", "log_sum_squares", "argmax_correct", "scores")
    outputs = {name: torch.full((num_tokens,), FILLER) for name in names}
    return {**outputs, "logprobs": torch.full((num_tokens,), -torch.inf, requires_grad=True)}


def added(shares: Sequence[dict[str, Metric]]) -> dict[str, float]:
    """Metrics of microbatches -> the step's, as a trainer reduces them."""
    combine = {"sum": sum, "min": min, "max": max}
    return {
        name: combine[metric.reduce](share[name].value.item() for share in shares) for name, metric in shares[0].items()
    }
