"""The family table. A family is a module with HF_ARCHITECTURE, read_config and rules."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import llama, qwen2, qwen3
from megalign.conversion.rules import Rule
from megalign.errors import UserError

FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
"""By model_type, which is also Architecture.family."""


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """The family of a config.json's content."""
    by_architecture = {family.HF_ARCHITECTURE: family for family in FAMILIES.values()}
    # A config that was never saved with a model has no architecture; its type then says what it is.
    if config.get("architectures"):
        name, table = config["architectures"][0], by_architecture
    else:
        name, table = config.get("model_type"), FAMILIES
    if name not in table:
        raise UserError(
            f"architecture {name!r} is not supported; megalign has {', '.join(by_architecture)} "
            "(see config.json's 'architectures')"
        )
    return table[name]


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Reads the content of a config.json; what megalign does not compute is refused by name."""
    return family_of(config).read_config(config)


def rules_of(architecture: Architecture) -> list[Rule]:
    """The weight rules of an architecture."""
    return FAMILIES[architecture.family].rules(architecture)
