"""Tokens that neighbouring sequences begin with are computed once: a prompt's, for all of its completions.

A causal layer's output at a token depends on the tokens before it alone, so two sequences that begin alike have the
same hidden states there. The rest of the house sees whole sequences; only what runs through the layers is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTEST = 16
"""Tokens below which a common beginning is not worth a gather of its keys and values."""


@dataclass(frozen=True)
class SharedPrefixes:
    """Which of a batch's T tokens are computed, T' of them, and where each of the T is found among those."""

    kept: Tensor  # [T'] int64, increasing
    source: Tensor  # [T] int64
    queries: tuple[int, ...]  # tokens computed of each sequence, its last ones; at least 1


def common_beginnings(tokens: Tensor, lengths: Sequence[int]) -> tuple[int, ...]:
    """How many tokens each of the joined sequences has in common with the one before it, below SHORTEST as 0.

    Its last token never counts: something of a sequence is always computed.
    """
    parts, common = tokens.split(list(lengths)), [0] * len(lengths)
    for number in range(1, len(parts)):
        size = min(len(parts[number]) - 1, len(parts[number - 1]))
        differs = (parts[number][:size] != parts[number - 1][:size]).nonzero()
        size = int(differs[0]) if len(differs) else size
        common[number] = size if size >= SHORTEST else 0
    return tuple(common)


def num_shared(shared: Sequence[int], multiple: int) -> int:
    """T - T': tokens that need not be computed."""
    return sum(shared) // multiple * multiple


def shared_prefixes(shared: Sequence[int], lengths: Sequence[int], multiple: int) -> SharedPrefixes | None:
    """From `common_beginnings` (later sequences share nothing); T' is a multiple of `multiple`, as T is.

    None where nothing is shared.
    """
    own = [*shared, *[0] * (len(lengths) - len(shared))]
    surplus = sum(own) - num_shared(own, multiple)
    for number, common in enumerate(own):  # so many tokens are computed again
        again = min(common, surplus)
        own[number], surplus = common - again, surplus - again
    if not any(own):
        return None
    kept, source, start, computed = [], [], 0, 0
    for common, length in zip(own, lengths, strict=True):
        kept.append(torch.arange(start + common, start + length))
        # What the sequence before it has at the same place, wherever that was found.
        inherited = source[-1][:common] if common else torch.arange(0)
        source.append(torch.cat([inherited, torch.arange(computed, computed + length - common)]))
        start, computed = start + length, computed + length - common
    queries = tuple(length - common for common, length in zip(own, lengths, strict=True))
    return SharedPrefixes(torch.cat(kept), torch.cat(source), queries)
