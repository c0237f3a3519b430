"""Hugging Face tensors that hold several others, one behind the other (Phi-3's qkv_proj, gate_up_proj)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megalign.conversion.architecture import Architecture
from megalign.conversion.rules import HfTensor, Range, Rule


@dataclass(frozen=True)
class Fused(Rule):
    """A rule on dim 0 whose Hugging Face tensors are, in the rule's order, the rows of a single one."""

    apart: Rule | None = None
    """The rule for the tensors one by one."""

    @classmethod
    def of(cls, apart: Rule, hf: str, rows: str) -> Fused:
        """`rows` is the name of the Architecture size that the tensor `hf` has."""
        return cls(apart.megatron, (HfTensor(hf, (rows, *apart.hf[0].shape[1:])),), apart=apart)

    def ranges(self, architecture: Architecture, tp_size: int) -> Iterator[Range]:
        """See Rule.ranges."""
        assert self.apart is not None
        first, begins = 0, {}
        for tensor in self.apart.hf:
            begins[tensor] = first
            first += tensor.sizes(architecture)[0]
        for tensor, start, stop, step in self.apart.ranges(architecture, tp_size):
            yield Range(self.hf[0], begins[tensor] + start, begins[tensor] + stop, step)


def fuse(rules: list[Rule], megatron: str, hf: str, rows: str) -> list[Rule]:
    """The rules with the one of a Megatron tensor fused."""
    assert any(rule.megatron == megatron for rule in rules), megatron
    return [Fused.of(rule, hf, rows) if rule.megatron == megatron else rule for rule in rules]
