"""The fields of dataclasses as lines of help."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import MISSING, Field, is_dataclass
from typing import Any

from megalign.config.base import Config, default_of, docs, hints, specs
from megalign.config.values import asked_for

SYNTAX = (
    "--a_b is --a-b. Booleans may stand alone, lists take several words, mappings are JSON or YAML.",
    "  --config FILE  YAML file of fields; the command line wins, and env: sets environment variables",
)


def field_lines(classes: Sequence[type]) -> list[str]:
    """One line a field: two spaces, --name, what it takes, its default and its doc; under its class's heading."""
    lines: list[str] = []
    shown: set[str] = set()
    for cls in classes:
        known, annotations = specs(cls), hints(cls)
        texts = {name: spec.metadata.get("help", "") for name, spec in known.items()}
        texts |= docs(cls) if issubclass(cls, Config) else {}
        # A field stands where it was declared last: learning_rate's default is the algorithm's.
        for owner in [owner for owner in cls.__mro__ if is_dataclass(owner)]:
            own = inspect.get_annotations(owner)
            names = [name for name in own if name in known and known[name].init and name not in shown]
            shown.update(names)
            if names:
                lines += ["", inspect.getdoc(owner) or owner.__name__]
                lines += [_field_line(known[name], annotations[name], texts[name]) for name in names]
    return lines


def _field_line(spec: Field, annotation: Any, text: str) -> str:
    legal = ",".join(str(choice) for choice in spec.metadata.get("choices", ()))
    takes = asked_for(annotation)
    if legal:
        takes = ("a list of " if takes.startswith("a list") else "") + "{" + legal + "}"
    required = spec.default is MISSING and spec.default_factory is MISSING
    default = "required" if required else repr(default_of(spec))
    return f"  --{spec.name} <{takes}> [{default}]  {text}"
