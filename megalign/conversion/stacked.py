"""Hugging Face tensors that hold the experts of a layer, each transposed: [experts, columns, rows]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megalign.conversion.architecture import Architecture
from megalign.conversion.rules import Copy, HfTensor, Range, Rule


def stacked(hf: str, *sizes: str) -> HfTensor:
    """[experts, *sizes], in names of Architecture sizes; a matrix is the transpose of Megatron's."""
    return HfTensor(hf, ("num_experts", *sizes), stacked=True, transposed=len(sizes) == 2)


def stacked_copy(megatron: str, hf: str, *sizes: str, dim: int | None = None) -> Copy:
    """An expert's tensor as it is; `dim` is Megatron's."""
    return Copy(megatron, (stacked(hf, *sizes),), dim)


@dataclass(frozen=True)
class InterleavedGateUp(Rule):
    """GateUp whose rows stand by turns in one tensor: gate, up, gate, up."""

    @classmethod
    def of(cls, megatron: str, hf: str, *sizes: str) -> InterleavedGateUp:
        """`sizes` as for `stacked`."""
        return cls(megatron, (stacked(hf, *sizes),))

    def ranges(self, architecture: Architecture, tp_size: int) -> Iterator[Range]:
        """See Rule.ranges."""
        (tensor,) = self.hf
        length = tensor.part_sizes(architecture)[0]
        assert length % (2 * tp_size) == 0, f"{self.megatron}: tp {tp_size}"
        rows = length // tp_size
        for rank in range(tp_size):
            for first in (0, 1):
                yield Range(tensor, rank * rows + first, (rank + 1) * rows, 2)
