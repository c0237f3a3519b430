"""Rotary position embedding (arXiv 2104.09864) of packed sequences, applied by our attention and not by Megatron.

Megatron has one table for all layers and knows no LongRoPE; here each layer has its kind, and a token's position is
where it stands in its own sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megalign.compiled import one_pass
from megalign.conversion.architecture import Architecture

if TYPE_CHECKING:
    from megalign.model.attention import PackedSequences


@dataclass(frozen=True)
class Rotary:
    """How the layers of one kind rotate their queries and keys; no parameters."""

    architecture: Architecture
    local: bool = False
    """Whether the layers have a base of their own."""

    @classmethod
    def of(cls, architecture: Architecture, layer: int) -> Rotary:
        """That of a (global) layer."""
        has_window = architecture.window(layer) is not None
        return cls(architecture, local=has_window and architecture.local_rotary_base is not None)

    def __call__(
        self,
        query: Tensor,  # [T / cp, heads, head_dim]
        key: Tensor,  # [T / cp, groups, head_dim]
        packed: PackedSequences,
    ) -> tuple[Tensor, Tensor]:
        """Query and key, rotated."""
        cos, sin = self._tables(packed, query)
        rotate = _rotate_pairs if self.architecture.rotary_interleaved else _rotate_halves
        return rotate(query, cos, sin), rotate(key, cos, sin)

    def _tables(self, packed: PackedSequences, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [T / cp, 1, rotary_dim] each, made once a microbatch for all layers of the kind."""
        name = (self.local, like.dtype)
        if name not in packed.rotary:
            angles = packed.local(_angles(self.architecture, self.local, packed).to(like.device))
            pairs = angles.repeat_interleave(2, -1) if self.architecture.rotary_interleaved else angles.repeat(1, 2)
            factor = 1.0 if self.local else attention_factor(self.architecture)
            cos, sin = pairs.cos() * factor, pairs.sin() * factor
            packed.rotary[name] = cos[:, None].to(like.dtype), sin[:, None].to(like.dtype)
        return packed.rotary[name]


@one_pass
def _rotate_halves(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, head_dim], dim i with dim i + rotary_dim / 2."""
    first, second = heads[..., : cos.shape[-1]].chunk(2, dim=-1)
    return _turned(heads, torch.cat((-second, first), dim=-1), cos, sin)


@one_pass
def _rotate_pairs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, head_dim], dim 2i with dim 2i + 1."""
    turned = heads[..., : cos.shape[-1]]
    return _turned(heads, torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2), cos, sin)


def _turned(heads: Tensor, partner: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first dims turned with their partners, the others behind them."""
    width = cos.shape[-1]
    turned = heads[..., :width] * cos + partner * sin
    return torch.cat((turned, heads[..., width:]), dim=-1) if width < heads.shape[-1] else turned


def _angles(architecture: Architecture, local: bool, packed: PackedSequences) -> Tensor:
    """[T, rotary_dim / 2] float32; the pads behind a sequence do not make it a longer one."""
    own = packed.unpadded_lengths
    frequencies = {length: inverse_frequencies(architecture, local=local, length=length) for length in set(own)}
    return torch.cat(
        [
            torch.outer(torch.arange(length).float(), frequencies[unpadded])
            for length, unpadded in zip(packed.lengths, own, strict=True)
        ]
    )


def inverse_frequencies(architecture: Architecture, *, local: bool = False, length: int = 0) -> Tensor:
    """[rotary_dim / 2] float32 rotary frequencies, scaled as transformers scales them.

    Only LongRoPE depends on the sequence's length: past original_max_position_embeddings all of the sequence takes the
    long factors. transformers decides by the longest sequence of a batch, vLLM once by its max_model_len.
    """
    dim = architecture.rotary_dim
    base = architecture.local_rotary_base if local else architecture.rotary_base
    periods = base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    scaling = None if local else architecture.rope_scaling
    if scaling is None:
        return 1.0 / periods
    if scaling["rope_type"] == "linear":
        return 1.0 / periods / scaling["factor"]
    if scaling["rope_type"] == "longrope":
        is_long = length > scaling["original_max_position_embeddings"]
        return 1.0 / (torch.tensor(scaling["long_factor" if is_long else "short_factor"]) * periods)
    if scaling["rope_type"] == "yarn":
        return _yarn(periods, base, dim, scaling)
    assert scaling["rope_type"] == "llama3", scaling
    return _llama3(1.0 / periods, scaling)


def attention_factor(architecture: Architecture) -> float:
    """What cos and sin are multiplied by."""
    return (architecture.rope_scaling or {}).get("attention_factor", 1.0)


def _llama3(frequencies: Tensor, scaling: Any) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = (original / wavelength - low) / (high - low)
    scaled = torch.where(wavelength > original / low, frequencies / scaling["factor"], frequencies)
    smoothed = (1 - smooth) * scaled / scaling["factor"] + smooth * scaled
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, smoothed, scaled)


def _yarn(periods: Tensor, base: float, dim: int, scaling: Any) -> Tensor:
    """arXiv 2309.00071, section 3.2: a ramp over the dims from kept to stretched."""

    def dim_of(rotations: float) -> float:
        """Which dim turns so many times over the original length."""
        turns = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(base))

    low, high = dim_of(scaling["beta_fast"]), dim_of(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    kept = 1 - stretched
    return 1.0 / (scaling["factor"] * periods) * (1 - kept) + 1.0 / periods * kept
