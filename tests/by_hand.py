"""Batches packed without the collator, so that parity tests do not lean on what they should check; differences."""

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


def random_batch(seed: int) -> Batch:
    """Two sequences, of 8 and 16 random tokens, which every layout of two ranks takes without pads."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        tokens=torch.randint(3, 101, (24,), generator=generator),
        cu_seqlens=torch.tensor([0, 8, 24], dtype=torch.int32),
        num_sequences=2,
        token_columns={"loss_mask": torch.tensor([False, *[True] * 7, False, *[True] * 15])},
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; NaN if either has one, 0 for two that are 0."""
    difference = float((found.float() - wanted.float()).norm())
    return difference if difference == 0 else float(difference / wanted.float().norm())


def worst(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `relative` of tensors that must have the same names, and whose it is."""
    names = sorted(wanted)
    assert sorted(found) == names
    differences = torch.tensor([relative(found[name], wanted[name]) for name in names])
    place = int(differences.argmax())  # takes NaN for the largest; Python's max() would drop it
    return float(differences[place]), names[place]
