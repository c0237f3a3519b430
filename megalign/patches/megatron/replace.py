"""Another function, or value, under one of Megatron's names."""

from __future__ import annotations

from typing import Any


def replace(module: Any, name: str, by: Any) -> None:
    """Sets it; a name that upstream has given up would be set without effect."""
    assert hasattr(module, name), f"megatron-core has no {module.__name__}.{name} any more"
    setattr(module, name, by)
