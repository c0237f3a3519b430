"""What families with experts share: the rules of a router, its experts, and the expert that every token passes."""

from __future__ import annotations

from dataclasses import replace

from megalign.conversion.rules import Copy, GateUp, Rule

_MEGATRON = "decoder.layers.*.mlp."
_SHARED = "moe.shared_ffn_hidden_size"


def with_experts(dense: list[Rule], *experts: Rule) -> list[Rule]:
    """A dense family's rules, its feed-forward part in the dense layers only, and `experts` in the others."""
    kept = [replace(rule, layers="dense") if rule.megatron.startswith(_MEGATRON) else rule for rule in dense]
    return [*kept, *(replace(rule, layers="moe") for rule in experts)]


def routed_rules(hf: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> list[Rule]:
    """Router and experts; `hf` is what their names begin with."""
    mcore, one = _MEGATRON + "experts.local_experts.*.", hf + "experts.*."
    columns = ("hidden_size", "moe.ffn_hidden_size")
    return [
        Copy.of(_MEGATRON + "router.weight", hf + "gate.weight", ("num_experts", "hidden_size")),
        GateUp.of(mcore + "linear_fc1.weight", f"{one}{gate}.weight", f"{one}{up}.weight", rows="moe.ffn_hidden_size"),
        Copy.of(mcore + "linear_fc2.weight", f"{one}{down}.weight", columns, dim=1),
    ]


def shared_rules(hf: str) -> list[Rule]:
    """The shared expert; `hf` is what its names begin with."""
    mcore = _MEGATRON + "shared_experts."
    return [
        GateUp.of(mcore + "linear_fc1.weight", hf + "gate_proj.weight", hf + "up_proj.weight", rows=_SHARED),
        Copy.of(mcore + "linear_fc2.weight", hf + "down_proj.weight", ("hidden_size", _SHARED), dim=1),
    ]


def selection_bias_rule(hf: str) -> Rule:
    """The router's buffer of numbers that are added to scores where experts are chosen."""
    return replace(Copy.of(_MEGATRON + "router.expert_bias", hf, ("num_experts",)), layers="moe")
