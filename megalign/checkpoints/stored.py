"""The names of a model's tensors in a torch_dist checkpoint, both ways.

Layers that are alike share a name and have an axis in front, and so have a layer's experts; Megatron numbers the
layers one by one when they differ. A tensor of the whole model stands there as one rank alone would hold it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megalign.conversion.architecture import Architecture
from megalign.conversion.names import FUSED_NORMS, Key, canonical
from megalign.conversion.rules import Rule

_LAYERS, _EXPERTS, _EXPERT = "decoder.layers.", "mlp.experts.experts.", "mlp.experts.local_experts."
_LAYER_NAME = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT_NAME = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(.+)")
_FUSED = {plain: fused for fused, plain in FUSED_NORMS.items()}
_WRAPPERS = re.compile(r"(?:(?:module|model\d*)\.)+")
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler")


class Place(NamedTuple):
    """Where a tensor is: a name, and its index on the axes in front (layer, expert) with their sizes."""

    name: str
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class StoredName(NamedTuple):
    """A name in a checkpoint: the pattern of its keys, and which layer and expert it is for (None: an axis)."""

    pattern: str
    layer: int | None
    expert: int | None


def layers_are_numbered(architecture: Architecture) -> bool:
    """As Megatron decides: its config gives layers that differ as a list (transformer_block.py:830/736)."""
    return len({architecture.layer_kind(layer) for layer in range(architecture.num_layers)}) > 1


def places(rule: Rule, key: Key, architecture: Architecture) -> list[Place]:
    """Where programs look for the tensor: those with Transformer Engine's layers, and those with local ones.

    The two differ in the norms that they say a linear has in front of it (gpt_layer_specs.py:417/459), which are
    small enough to be written under both names.
    """
    if not rule.per_layer:
        return [Place(key.pattern)]
    layer, rest = key.indices[0], key.pattern.removeprefix(f"{_LAYERS}*.")
    index, sizes = [], []
    prefix = _LAYERS
    if layers_are_numbered(architecture):
        prefix += f"{layer}."
    else:
        index.append(layer)
        sizes.append(architecture.num_layers)
    if rule.per_expert:
        rest = rest.replace(f"{_EXPERT}*.", _EXPERTS)
        index.append(key.indices[1])
        sizes.append(architecture.num_experts)
    names = dict.fromkeys((_in_transformer_engine(rest, layer, architecture), _in_local_layers(rest)))
    return [Place(prefix + name, tuple(index), tuple(sizes)) for name in names]


def _in_transformer_engine(rest: str, layer: int, architecture: Architecture) -> str:
    is_plain = (rest == "input_layernorm.weight" and architecture.mla is not None) or (
        rest == "pre_mlp_layernorm.weight" and architecture.layer_kind(layer) == "moe"
    )
    return rest if is_plain else _FUSED.get(rest, rest)


def _in_local_layers(rest: str) -> str:
    return _FUSED.get(rest, rest) if rest in ("input_layernorm.weight", "pre_mlp_layernorm.weight") else rest


def stored_name(name: str) -> StoredName | None:
    """What a tensor's name in any Megatron-Core program's checkpoint means; None: not the model's."""
    if _NOT_THE_MODEL.match(name):
        return None
    name = _WRAPPERS.sub("", name, count=1) if _WRAPPERS.match(name) else name
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return StoredName(name, None, None)
    layer, rest, expert = match[1], match[2], None
    if of_experts := _EXPERT_NAME.fullmatch(rest):
        expert, rest = of_experts[1], f"{_EXPERT}{of_experts[1] or 0}.{of_experts[2]}"
    pattern = canonical(f"{_LAYERS}{layer or 0}.{rest}", 0).pattern
    return StoredName(pattern, *(None if number is None else int(number) for number in (layer, expert)))


def extra_states(architecture: Architecture) -> list[str]:
    """The names under which Megatron's linears look for a state of theirs (of FP8), which here is empty."""
    found = []
    numbered, layers = layers_are_numbered(architecture), architecture.num_layers
    for layer in range(layers):
        prefix, shard = (f"{_LAYERS}{layer}.", "0_1") if numbered else (_LAYERS, f"{layer}_{layers}")
        found += [f"{prefix}{name}._extra_state/shard_{shard}" for name in _linears(architecture, layer)]
        if architecture.layer_kind(layer) == "dense":
            continue
        for expert in range(architecture.num_experts):
            total = architecture.num_experts
            shard = f"{expert}_{total}" if numbered else f"{layer}.{expert}_{layers}.{total}"
            found += [f"{prefix}{_EXPERTS}linear_fc{number}._extra_state/shard_{shard}" for number in (1, 2)]
    return found


def _linears(architecture: Architecture, layer: int) -> list[str]:
    if architecture.mla is None:
        projections = ["linear_qkv"]
    else:
        queries = ["q"] if architecture.mla.q_lora_rank is None else ["q_down", "q_up"]
        projections = [f"linear_{part}_proj" for part in (*queries, "kv_down", "kv_up")]
    names = [f"self_attention.{name}" for name in (*projections, "linear_proj", "core_attention")]
    if architecture.layer_kind(layer) == "dense":
        return [*names, "mlp.linear_fc1", "mlp.linear_fc2"]
    if architecture.moe.shared_ffn_hidden_size is None:
        return names
    return [*names, "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
