"""A Batch packed without the collator, so that parity tests do not lean on what they should check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megalign.batch import Batch
from megalign.parallel.groups import ParallelGroups

PAD = 7  # an ordinary token: nothing may depend on what stands behind a sequence


def packed(sequences: Sequence[Mapping[str, Tensor]], groups: ParallelGroups, **columns: Tensor) -> Batch:
    """Sequences of `tokens`, `loss_mask` and other token columns, each padded as context parallelism needs it.

    `columns` are per sequence.
    """
    lengths = [
        -(-len(sequence["tokens"]) // groups.sequence_multiple) * groups.sequence_multiple for sequence in sequences
    ]
    tail = -sum(lengths) % groups.token_multiple

    def joined(name: str) -> Tensor:
        parts = [sequence[name] for sequence in sequences]
        filler = PAD if name == "tokens" else 0
        ends = [part.new_full((length - len(part),), filler) for part, length in zip(parts, lengths, strict=True)]
        pieces = [piece for pair in zip(parts, ends, strict=True) for piece in pair]
        return torch.cat([*pieces, parts[0].new_full((tail,), filler)])

    return Batch(
        tokens=joined("tokens"),
        cu_seqlens=torch.tensor([0, *lengths, *([tail] if tail else [])]).cumsum(0).int(),
        num_sequences=len(sequences),
        unpadded_lengths=torch.tensor([len(sequence["tokens"]) for sequence in sequences]),
        token_columns={name: joined(name) for name in sequences[0] if name != "tokens"},
        sequence_columns=columns,
    )


def unpacked(batch: Batch, column: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """A token column -> each sequence's part, without its pads."""
    parts = column.split(batch.cu_seqlens.diff().tolist())
    return [part[:length] for part, length in zip(parts, lengths, strict=False)]
