"""Which tensors a model's checkpoint must hold and where they are; what is missing, unexpected or mis-shaped fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megalign.checkpoints.reader import TorchDistReader
from megalign.checkpoints.stored import Place, StoredName, stored_name
from megalign.conversion.architecture import Architecture
from megalign.conversion.families import rules_of
from megalign.conversion.hf_files import listing
from megalign.conversion.names import Key
from megalign.conversion.rules import Rule, Vocab, shard_shape
from megalign.errors import UserError

_MANY = 20_000  # tensors, looked for where it is known already that something is wrong


@dataclass(frozen=True)
class Index:
    """Every tensor of the model with its places: more than one where programs name it differently."""

    places: dict[Key, list[Place]] = field(default_factory=dict)
    pad_rows: dict[str, int] = field(default_factory=dict)
    """Name -> rows behind the vocabulary, which Megatron-LM adds and no token has."""


def index_of(reader: TorchDistReader, architecture: Architecture) -> Index:
    """Raises unless the model's tensors in the checkpoint are exactly those of the architecture."""
    rules = {rule.megatron: rule for rule in rules_of(architecture) if not rule.duplicate}
    named: dict[str, dict[tuple[int | None, int | None], list[str]]] = {name: {} for name in rules}
    index, missing, unexpected, mis_shaped = Index(), [], [], []
    for name in reader.names():
        parsed = stored_name(name)
        if parsed is None:
            continue
        rule = rules.get(parsed.pattern)
        if rule is None or not _belongs(parsed, rule, architecture):
            unexpected.append(f"{name} {list(reader.shape(name))}")
            continue
        named[parsed.pattern].setdefault((parsed.layer, parsed.expert), []).append(name)
        if fault := _fault(name, parsed, rule, reader, architecture, index):
            mis_shaped.append(fault)
    keys = (key for rule in rules.values() for key in rule.keys(architecture))
    for number, key in enumerate(keys):
        if number >= _MANY and (missing or mis_shaped):
            break  # a config.json of any number of layers
        found = list(_places(named[key.pattern], key, architecture))
        if found:
            index.places[key] = found
        else:
            missing.append(key.name)
    faults = {"missing": missing, "unexpected": unexpected, "mis-shaped": mis_shaped}
    told = [f"{fault} tensors: {listing(names)}" for fault, names in faults.items() if names]
    if told:
        raise UserError(
            f"{reader.path} is not the {architecture.family} of its config.json; {'; '.join(told)}; give the "
            "config.json that it was trained with"
        )
    return index


def _belongs(parsed: StoredName, rule: Rule, architecture: Architecture) -> bool:
    """Whether some tensor of the rule may have that name."""
    if parsed.layer is not None and parsed.layer >= architecture.num_layers:
        return False
    if parsed.layer is not None and rule.layers not in (None, architecture.layer_kind(parsed.layer)):
        return False
    return parsed.expert is None or parsed.expert < architecture.num_experts


def _axes(parsed: StoredName, rule: Rule, architecture: Architecture) -> tuple[int, ...]:
    """The sizes of the axes in front of a tensor with that name."""
    axes = (
        (rule.per_layer and parsed.layer is None, architecture.num_layers),
        (rule.per_expert and parsed.expert is None, architecture.num_experts),
    )
    return tuple(size for present, size in axes if present)


def _places(
    named: dict[tuple[int | None, int | None], list[str]], key: Key, architecture: Architecture
) -> Iterator[Place]:
    """Where the key is: under names of its own, or at its index of an axis of layers, of experts, of both."""
    layer, expert = (*key.indices, None, None)[:2]
    for fixed in dict.fromkeys(((layer, expert), (None, expert), (layer, None), (None, None))):
        numbers = ((layer, fixed[0], architecture.num_layers), (expert, fixed[1], architecture.num_experts))
        axes = [(at, size) for at, number, size in numbers if at is not None and number is None]
        for name in named.get(fixed, []):
            yield Place(name, tuple(at for at, _ in axes), tuple(size for _, size in axes))


def _fault(
    name: str, parsed: StoredName, rule: Rule, reader: TorchDistReader, architecture: Architecture, index: Index
) -> str | None:
    """How the tensor's shape is not the rule's; rows behind the vocabulary are noted in the index."""
    axes, own = _axes(parsed, rule, architecture), shard_shape(rule, architecture, 1)
    expected, found = (*axes, *own), reader.shape(name)
    if isinstance(rule, Vocab) and len(found) == len(expected) and found[1:] == expected[1:] and found[0] > own[0]:
        index.pad_rows[name] = found[0] - own[0]
        return None
    return None if found == expected else f"{name} {list(found)} instead of {list(expected)}"
