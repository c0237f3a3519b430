"""Two-way weight rules: a Megatron tensor is a concatenation, along one dim, of ranges of HF tensors.

A rule lists those ranges in Megatron's order; `pieces` cuts them for one tensor-parallel shard. Copying a
piece one way loads, the other way exports. Shapes are names of an Architecture's sizes. No torch in here.
A rule whose Megatron name has one `*` is of each layer, with two of each expert of each layer. The Hugging Face
tensor of an expert may be a part of one that holds a layer's experts, and lie transposed in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from megalign.conversion.architecture import Architecture, LayerKind
from megalign.conversion.names import Key, numbered

if TYPE_CHECKING:
    from torch import Tensor


class HfTensor(NamedTuple):
    """A Hugging Face tensor; the first `*` in its name is the layer, the second the expert."""

    name: str
    shape: tuple[str, ...]  # names of Architecture sizes, dotted for those of its parts
    stacked: bool = False  # its first dim is the experts of a layer
    transposed: bool = False  # what one expert (or layer) has of it stands with rows and columns exchanged

    def sizes(self, architecture: Architecture) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(attrgetter(size)(architecture) for size in self.shape)

    def part_sizes(self, architecture: Architecture) -> tuple[int, ...]:
        """The shape of what one Megatron tensor takes of it, as Megatron has it."""
        sizes = self.sizes(architecture)[self.stacked :]
        return sizes[::-1] if self.transposed else sizes


class Range(NamedTuple):
    """Rows (or, for a rule on dim 1, columns) start:stop:step of a Hugging Face tensor, as Megatron has it."""

    tensor: HfTensor
    start: int
    stop: int
    step: int = 1

    @property
    def length(self) -> int:
        """How many rows it has."""
        return len(range(self.start, self.stop, self.step))

    def part(self, first: int, end: int) -> slice:
        """Where its rows number first:end stand in the tensor."""
        begin, last = (self.start + row * self.step for row in (first, end - 1))
        return slice(begin, last + 1, None if self.step == 1 else self.step)


class Piece(NamedTuple):
    """turned(hf[hf_index]) == shard[shard_index], for one shard of one Megatron tensor."""

    hf_name: str
    hf_shape: tuple[int, ...]
    hf_index: tuple[int | slice, ...]
    shard_index: tuple[slice, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the piece itself, as Megatron has it."""
        return tuple(part.stop - part.start for part in self.shard_index)

    def turned(self, part: Tensor) -> Tensor:
        """A view: what stands in the Hugging Face tensor as it stands in the shard, and the other way round."""
        return part.mT if self.transposed else part


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor (`*` in its name: the layer, the expert) and the Hugging Face tensors it is made of."""

    megatron: str
    hf: tuple[HfTensor, ...]
    dim: int | None = 0
    """The dim along which ranges are concatenated and TP splits; None: the same tensor on every TP rank."""
    duplicate: bool = False
    """A second copy of what another rule holds (the tied head of the last stage): loaded, never exported."""
    layers: LayerKind | None = None
    """Which layers have it; None: all of them."""

    @property
    def per_layer(self) -> bool:
        """Whether layers have this tensor."""
        return "*" in self.megatron

    @property
    def per_expert(self) -> bool:
        """Whether each expert of a layer has this tensor: expert tensor parallelism splits it, not TP."""
        return self.megatron.count("*") == 2

    def keys(self, architecture: Architecture) -> Iterator[Key]:
        """Every Megatron tensor of the whole model that the rule speaks of."""
        if not self.per_layer:
            yield Key(self.megatron)
            return
        for layer in range(architecture.num_layers):
            if self.layers is not None and architecture.layer_kind(layer) != self.layers:
                continue
            if not self.per_expert:
                yield Key(self.megatron, (layer,))
                continue
            for expert in range(architecture.num_experts):
                yield Key(self.megatron, (layer, expert))

    def ranges(self, architecture: Architecture, tp_size: int) -> Iterator[Range]:
        """The ranges in Megatron's order; shard r of n equal shards of their concatenation is TP rank r's."""
        dim = self.dim or 0
        for tensor in self.hf:
            yield Range(tensor, 0, tensor.part_sizes(architecture)[dim])

    def length(self, architecture: Architecture, tp_size: int) -> int:
        """The full length along `dim`, pads included."""
        return sum(item.length for item in self.ranges(architecture, tp_size))


@dataclass(frozen=True)
class Copy(Rule):
    """One tensor as it is: replicated, or split on dim 0 or 1."""

    @classmethod
    def of(cls, megatron: str, hf: str, shape: tuple[str, ...], *, dim: int | None = None) -> Copy:
        """`shape` in names of Architecture sizes."""
        return cls(megatron, (HfTensor(hf, shape),), dim)


@dataclass(frozen=True)
class QKV(Rule):
    """Group by group: the group's query heads, its key head, its value head. A TP shard may cut a group."""

    @classmethod
    def of(cls, megatron: str, hf: str, *columns: str) -> QKV:
        """`hf` with a {} for q, k and v; `columns` is "hidden_size" for the weight, nothing for the bias."""
        parts = (("q", "query_size"), ("k", "kv_size"), ("v", "kv_size"))
        return cls(megatron, tuple(HfTensor(hf.format(part), (rows, *columns)) for part, rows in parts))

    def ranges(self, architecture: Architecture, tp_size: int) -> Iterator[Range]:
        """See Rule.ranges."""
        query, key, value = self.hf
        head = architecture.head_dim
        queries = architecture.query_size // architecture.num_query_groups
        for group in range(architecture.num_query_groups):
            yield Range(query, group * queries, (group + 1) * queries)
            yield Range(key, group * head, (group + 1) * head)
            yield Range(value, group * head, (group + 1) * head)


@dataclass(frozen=True)
class GateUp(Rule):
    """Each TP rank holds its share of the gate, then its share of the up projection."""

    @classmethod
    def of(cls, megatron: str, gate: str, up: str, *, rows: str = "ffn_hidden_size") -> GateUp:
        """[rows, hidden] each; `rows` names an Architecture size."""
        return cls(megatron, tuple(HfTensor(name, (rows, "hidden_size")) for name in (gate, up)))

    def ranges(self, architecture: Architecture, tp_size: int) -> Iterator[Range]:
        """See Rule.ranges."""
        length = self.hf[0].part_sizes(architecture)[0]
        assert length % tp_size == 0, f"{self.megatron}: tp {tp_size}"
        rows = length // tp_size
        for rank in range(tp_size):
            for tensor in self.hf:
                yield Range(tensor, rank * rows, (rank + 1) * rows)


@dataclass(frozen=True)
class Vocab(Rule):
    """Rows are tokens, padded at the end to a multiple of TP. Pad rows have no piece: zero, not exported."""

    @classmethod
    def of(cls, megatron: str, hf: str, *, duplicate: bool = False) -> Vocab:
        """[vocabulary, hidden]."""
        return cls(megatron, (HfTensor(hf, ("vocab_size", "hidden_size")),), duplicate=duplicate)

    @classmethod
    def bias(cls, megatron: str, hf: str) -> Vocab:
        """[vocabulary]: a head's bias."""
        return cls(megatron, (HfTensor(hf, ("vocab_size",)),))

    def length(self, architecture: Architecture, tp_size: int) -> int:
        """See Rule.length."""
        return architecture.padded_vocab_size(tp_size)


def shard_shape(rule: Rule, architecture: Architecture, tp_size: int) -> tuple[int, ...]:
    """The shape of one TP rank's shard of the Megatron tensor."""
    shape = list(rule.hf[0].part_sizes(architecture))
    if rule.dim is not None:
        length = rule.length(architecture, tp_size)
        assert length % tp_size == 0, f"{rule.megatron}: tp {tp_size} does not divide {length}"
        shape[rule.dim] = length // tp_size
    return tuple(shape)


def pieces(
    rule: Rule, architecture: Architecture, *, indices: tuple[int, ...], tp_rank: int, tp_size: int
) -> list[Piece]:
    """What the shard of rank `tp_rank` of `tp_size` (experts': of ETP) is made of, in the order of its rows."""
    shape = shard_shape(rule, architecture, tp_size)
    dim = rule.dim or 0
    first = 0 if rule.dim is None else tp_rank * shape[dim]
    found, position = [], 0
    for rows in rule.ranges(architecture, tp_size):
        low = max(position, first)
        high = min(position + rows.length, first + shape[dim])
        if low < high:
            tensor = rows.tensor
            part = _index(shape, dim, rows.part(low - position, high - position))
            part = part[::-1] if tensor.transposed else part
            found.append(
                Piece(
                    hf_name=numbered(tensor.name, indices),
                    hf_shape=tensor.sizes(architecture),
                    hf_index=(indices[-1], *part) if tensor.stacked else part,
                    shard_index=_index(shape, dim, slice(low - first, high - first)),
                    transposed=tensor.transposed,
                )
            )
        position += rows.length
    return found


def rows_of(piece: Piece, first: int, end: int) -> Piece | None:
    """What of the piece is in rows first:end of its shard, as a piece of these rows; None where nothing is."""
    rows = piece.shard_index[0]
    low, high = max(rows.start, first), min(rows.stop, end)
    if low >= high:
        return None
    # The rows' own place in the Hugging Face tensor: the last one where it is turned.
    at = len(piece.hf_index) - 1 if piece.transposed else len(piece.hf_index) - len(piece.shard_index)
    given = piece.hf_index[at]
    steps = range(given.start, given.stop, given.step or 1)[low - rows.start : high - rows.start]
    cut = slice(steps[0], steps[-1] + 1, given.step)
    return piece._replace(
        hf_index=(*piece.hf_index[:at], cut, *piece.hf_index[at + 1 :]),
        shard_index=(slice(low - first, high - first), *piece.shard_index[1:]),
    )


def expand(rules: list[Rule], architecture: Architecture) -> list[tuple[Rule, Key]]:
    """Every Megatron tensor of the whole model with its rule, in the order of the Hugging Face tensors."""
    layered = [rule for rule in rules if rule.per_layer]
    first = rules.index(layered[0])
    # Stable: a layer's tensors stay in the rules' order, an expert's beside each other.
    of_layers = sorted(
        ((rule, key) for rule in layered for key in rule.keys(architecture)), key=lambda item: item[1].indices[0]
    )
    before = [(rule, key) for rule in rules[:first] if not rule.per_layer for key in rule.keys(architecture)]
    after = [(rule, key) for rule in rules[first:] if not rule.per_layer for key in rule.keys(architecture)]
    return [*before, *of_layers, *after]


def hf_shapes(rules: list[Rule], architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the model, in order."""
    return {
        numbered(tensor.name, key.indices): tensor.sizes(architecture)
        for rule, key in expand(rules, architecture)
        for tensor in rule.hf
    }


def _index(shape: tuple[int, ...], dim: int, part: slice) -> tuple[slice, ...]:
    return tuple(part if d == dim else slice(0, size) for d, size in enumerate(shape))
