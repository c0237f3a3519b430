"""Causal attention inside each sequence of a packed batch, on torch's scaled_dot_product_attention.

Queries and keys are rotated here as well. Where torch's causal mask does not do (a sliding window, capped scores, a
sink) queries are answered in blocks, so that no mask or score matrix of a whole sequence exists. On a GPU, in bf16,
all sequences are one call of torch's FlashAttention where it has what the layer needs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from megalign.batch import Batch
from megalign.data.prefixes import SharedPrefixes
from megalign.parallel import context
from megalign.parallel.groups import Axis

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

if TYPE_CHECKING:
    from megalign.model.rotary import Rotary

BLOCK = 512
"""Queries of a block."""
WIDEST_HEAD = 256
"""Of FlashAttention's kernels; they take multiples of 8."""
_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed-sequence parameters, with the lengths on the host so that no layer waits for the device."""

    lengths: tuple[int, ...] = ()
    unpadded_lengths: tuple[int, ...] = ()
    cp: Axis | None = None
    order: Tensor | None = None  # [T] context.whole_order, when cp has several ranks
    prefixes: SharedPrefixes | None = None  # when some tokens are computed once for several sequences
    rotary: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # Rotary's tables

    @classmethod
    def of(cls, batch: Batch, cp: Axis, prefixes: SharedPrefixes | None = None) -> PackedSequences:
        """The parameters of a Batch; `max_seqlen` is the true longest sequence."""
        lengths, unpadded = batch.host_lengths
        queries = lengths if prefixes is None else prefixes.queries
        order = context.whole_order(lengths, cp.size).to(batch.tokens.device) if cp.size > 1 else None
        # Transformer Engine's context parallelism asks for them; without it they would only cost it a comparison on
        # the device in each layer. A tail that pads T is a sequence of its own, so both are the same.
        padded = batch.cu_seqlens if cp.size > 1 else None
        ends = batch.cu_seqlens
        if prefixes is not None:
            ends = torch.tensor((0, *queries)).cumsum(0).int().to(ends.device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=batch.cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=max(queries),
            max_seqlen_kv=max(lengths),
            lengths=lengths,
            unpadded_lengths=unpadded,
            cp=cp,
            order=order,
            prefixes=prefixes,
        )

    def local(self, tokens: Tensor) -> Tensor:
        """[T] -> [T / cp], this context rank's tokens; or [T'], those that are computed."""
        if self.prefixes is not None:
            return tokens[self.prefixes.kept]
        return tokens if self.order is None else tokens[self.order.view(self.cp.size, -1)[self.cp.rank]]


class PackedAttention(nn.Module):
    """softmax(q k^T * scale) v within each sequence; grouped queries without repeating keys.

    With a `window` a token sees that many tokens, itself included; with a `softcap` scores become
    softcap * tanh(score / softcap). With `sinks` each head has a score more in its softmax, a parameter, of a token
    whose value is 0; the heads' split over tensor ranks is the parameter's.
    Under context parallelism every rank gathers all keys and values, and answers its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        rotary: Rotary | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self._scale = softmax_scale  # None: 1 / sqrt(head_dim)
        self.rotary, self._window, self._softcap = rotary, window, softcap
        self.softmax_offset: nn.Parameter | None = None  # Megatron's name for sinks
        if sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))

    def forward(
        self,
        query: Tensor,  # [T / cp, heads, head_dim], or T' with shared prefixes
        key: Tensor,  # [T / cp, groups, head_dim]
        value: Tensor,  # [T / cp, groups, value_dim]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> Tensor:
        assert packed_seq_params is not None, "every batch is packed"
        if self.rotary is not None:
            query, key = self.rotary(query, key, packed_seq_params)
        dtype = query.dtype
        if not query.is_cuda and dtype is torch.bfloat16:
            # torch's CPU kernel takes 3.5 times as long for bf16's backward as for fp32's.
            query, key, value = query.float(), key.float(), value.float()
        if packed_seq_params.prefixes is not None:
            source = packed_seq_params.prefixes.source
            key, value = key.index_select(0, source), value.index_select(0, source)
        if self._is_one_call(query, value, packed_seq_params):
            return self._attend_together(query, key, value, packed_seq_params)
        runs = _runs(packed_seq_params)
        if packed_seq_params.order is not None:
            key, value = (
                context.gather_tokens(part, packed_seq_params.order, packed_seq_params.cp) for part in (key, value)
            )
        queries = query.split([run.num_queries for run in runs])
        parts = [self._attend(*run) for run in zip(queries, _of_runs(key, runs), _of_runs(value, runs), strict=True)]
        return torch.cat(parts).flatten(1).to(dtype)

    def _is_one_call(self, query: Tensor, value: Tensor, packed: PackedSequences) -> bool:
        """Whether FlashAttention has all that is asked for.

        Sequence by sequence, with new lengths in every step, an SFT step of 32 rows took ten times as long on an H200.
        """
        width = query.shape[-1]
        return (
            query.is_cuda
            and query.dtype is torch.bfloat16
            and "window_size" in _VARLEN_OPTIONS
            and packed.order is None
            and self._softcap is None
            and self.softmax_offset is None
            and width % 8 == 0
            and value.shape[-1] <= width <= WIDEST_HEAD
        )

    def _attend_together(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """All sequences at once; the values of latent attention, narrower than its keys, with zeros behind them."""
        width = value.shape[-1]
        before = -1 if self._window is None else self._window - 1
        attended = varlen_attn(
            query,
            key,
            F.pad(value, (0, query.shape[-1] - width)),
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self._scale,
            window_size=(before, 0),
            **({"enable_gqa": True} if "enable_gqa" in _VARLEN_OPTIONS else {}),  # torch 2.11 takes it for granted
        )
        return attended[..., :width].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last of the keys' positions."""
        is_plain = self._softcap is None and self.softmax_offset is None
        if is_plain and (self._window is None or len(key) <= self._window):
            return self._attend_causally(query, key, value)
        if len(query) <= BLOCK:
            return self._attend_block(query, key, value)
        before, parts = len(key) - len(query), []
        for first in range(0, len(query), BLOCK):
            block = query[first : first + BLOCK]
            end = before + first + len(block)
            start = 0 if self._window is None else max(0, before + first - self._window + 1)
            # A block's scores are made again in backward: those of all blocks are what must not exist.
            given = (self._attend_block, block, key[start:end], value[start:end])
            parts.append(checkpoint(*given, use_reentrant=False) if torch.is_grad_enabled() else given[0](*given[1:]))
        return torch.cat(parts)

    def _attend_block(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """By an explicit mask, all scores at once."""
        keys = torch.arange(len(key), device=key.device)
        distance = keys[len(key) - len(query) :, None] - keys
        seen = distance >= 0 if self._window is None else (distance >= 0) & (distance < self._window)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        if self._softcap is None and self.softmax_offset is None:
            grouped = query.shape[1] != key.shape[1]
            attended = F.scaled_dot_product_attention(query, key, value, seen, scale=self._scale, enable_gqa=grouped)
            return attended[0].transpose(0, 1)
        grouped = query.unflatten(1, (key.shape[1], -1))  # [1, groups, heads / groups, queries, head_dim]
        scale = query.shape[-1] ** -0.5 if self._scale is None else self._scale
        if self._softcap is None:
            scores = grouped @ key[:, :, None].mT * scale
        else:
            scores = self._softcap * torch.tanh(grouped @ key[:, :, None].mT * (scale / self._softcap))
        weights = self._softmax(scores.masked_fill(~seen, -torch.inf)).to(query.dtype)
        return (weights @ value[:, :, None])[0].flatten(0, 1).transpose(0, 1)

    def _softmax(self, scores: Tensor) -> Tensor:
        """[1, groups, heads / groups, queries, keys] in fp32, where sinks take their part and are left out."""
        if self.softmax_offset is None:
            return scores.softmax(-1, dtype=torch.float32)
        sinks = self.softmax_offset.to(scores.dtype).view(*scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]

    def _attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole, mask = len(query) == len(key), None
        turned = not whole and not query.is_cuda
        if turned:
            query, mask = query.flip(0), _stairs(len(query), len(key), query.dtype)
        elif not whole:
            mask = causal_lower_right(len(query), len(key))
        attended = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (query, key, value)),
            attn_mask=mask,
            is_causal=whole,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )[0].transpose(0, 1)
        return attended.flip(0) if turned else attended

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks as Megatron's checkpoints describe a tensor that tensor ranks split."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)


def _stairs(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """[queries, keys] what is added to the scores of the last `queries` of `keys` positions, the last one first.

    Each then sees one key less than the one before it, so that the rows are views of one line. On a CPU torch's
    causal_lower_right is a matrix, which backward keeps for every sequence in every layer.
    """
    line = torch.zeros(keys + queries - 1, dtype=dtype)
    line[keys:] = -torch.inf
    return line.as_strided((queries, keys), (1, 1))


@dataclass(frozen=True)
class _Run:
    """Neighbouring queries of one sequence, and the keys from its begin to the last of them."""

    num_queries: int
    start: int
    end: int


def _of_runs(tokens: Tensor, runs: list[_Run]) -> tuple[Tensor, ...]:
    """The keys or values of each run. Where none is in two of them, in one split, whose gradient is one tensor: each
    slice's would be as long as all of them."""
    lengths = [run.end - run.start for run in runs]
    if sum(lengths) == len(tokens):
        return tokens.split(lengths)
    return tuple(tokens[run.start : run.end] for run in runs)


def _runs(packed: PackedSequences) -> list[_Run]:
    """This rank's queries in order: whole sequences but for what was computed with the one before, or two pieces of
    each under context parallelism."""
    runs, start = [], 0
    size, rank = packed.cp.size, packed.cp.rank
    queries = packed.lengths if packed.prefixes is None else packed.prefixes.queries
    for length, own in zip(packed.lengths, queries, strict=True):
        if size == 1:
            runs.append(_Run(own, start, start + length))
        else:
            piece = length // (2 * size)
            runs += [_Run(piece, start, start + (number + 1) * piece) for number in (rank, 2 * size - 1 - rank)]
        start += length
    return runs
