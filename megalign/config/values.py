"""Values of config fields: read from text (command line, YAML), checked against type, choices and range.

Standard library only.
"""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, field
from enum import Enum
from numbers import Integral, Real
from typing import Any

from megalign.config.yaml_text import from_yaml
from megalign.errors import UserError

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_TOO_LARGE = 2**63
LONGEST = 200  # characters of a value in an error
_ASKED_FOR = {bool: "True or False", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


def option(
    default: Any,
    *,
    choices: tuple[Any, ...] = (),
    why: str = "",
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field whose value is one of `choices`, or in a range; `why` says why others are refused."""
    metadata = {
        "choices": choices,
        "why": why,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def kinds(annotation: Any) -> tuple[list[Any], bool]:
    """The plain types that an annotation allows (`list[str]` stays whole), and whether None is allowed."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = list(typing.get_args(annotation)) if is_union else [annotation]
    optional = type(None) in members
    plain = [kind for member in members if member is not type(None) for kind in _plain_kinds(member)]
    return list(dict.fromkeys(plain)), optional


def _plain_kinds(member: Any) -> list[Any]:
    if typing.get_origin(member) is typing.Literal:
        return [type(value) for value in typing.get_args(member)]
    return [dict if typing.get_origin(member) is dict else member]


def literals(annotation: Any) -> tuple[Any, ...]:
    """The values that Literal members of the annotation name; a script's own dataclass may have them."""
    is_literal = typing.get_origin(annotation) is typing.Literal
    members = (annotation,) if is_literal else typing.get_args(annotation)
    named = [member for member in members if typing.get_origin(member) is typing.Literal]
    return tuple(value for member in named for value in typing.get_args(member))


def _is_foreign(member: Any) -> bool:
    """Whether it is a type of a script's own dataclass about which nothing is known here."""
    return member not in _ASKED_FOR and typing.get_origin(member) is not list


def asked_for(annotation: Any) -> str:
    """The annotation in a user's words: "a number or None"."""
    members, optional = kinds(annotation)
    return " or ".join([_in_words(member) for member in members] + ["None"] * optional)


def _in_words(member: Any) -> str:
    if typing.get_origin(member) is list:
        (item,) = typing.get_args(member)
        return "a list of " + {str: "texts", int: "numbers", float: "numbers"}.get(item, "mappings")
    return _ASKED_FOR[member] if member in _ASKED_FOR else str(member)


def parse(name: str, annotation: Any, text: str) -> Any:
    """The value that `text` (from the command line, or a YAML string) means for a field of this
    annotation."""
    members, optional = kinds(annotation)
    if optional and text.lower() in ("none", "null", ""):
        return None
    if bool in members and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        if number in members:
            try:
                return number(text)
            except ValueError:
                continue
    if any(_is_foreign(member) for member in members):
        return from_yaml(text)
    lists = [member for member in members if typing.get_origin(member) is list]
    if lists and not text.startswith("["):
        (item,) = typing.get_args(lists[0])
        return text if str in members else [parse(name, item, text)]
    if lists or dict in members:
        loaded = from_yaml(text)
        if isinstance(loaded, list if lists else dict):
            return loaded
    if str in members:
        return text
    raise UserError(f"{name}={shown(text)} must be {asked_for(annotation)}; {_example(name, members)}")


def _example(name: str, members: list[Any]) -> str:
    """The way out of a wrong value: a line that is right."""
    examples = {bool: "true", int: "8", float: "1e-5", str: "text", dict: "'{key: value}'"}
    return f"write e.g. --{name} {examples.get(members[0], 'first second')}"


def check(name: str, annotation: Any, value: Any) -> Any:
    """`value` in the form that the field holds (a path as text, a whole number as float ...), or
    UserError."""
    members, optional = kinds(annotation)
    if any(_is_foreign(member) for member in members):
        return value
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None and optional:
        return None
    checked = _matching(name, members, value)
    if checked is None:
        rule = f"must be {asked_for(annotation)}"
        raise UserError(f"{name}={shown(value)} ({type(value).__name__}) {rule}; {_example(name, members)}")
    _check_plain(name, checked)
    named = literals(annotation)
    if named and checked not in named:
        raise UserError(f"{name}={shown(checked)} is unknown; legal: {', '.join(map(repr, named))}")
    return checked


def _matching(name: str, members: list[Any], value: Any) -> Any:
    """The value as one of the plain types; None when it is of none of them."""
    if isinstance(value, bool):
        return value if bool in members else None
    if isinstance(value, Integral) and int in members:
        return int(value)
    if isinstance(value, Real) and float in members:
        return _finite(value)
    if isinstance(value, str) and str in members:
        return value
    if isinstance(value, Mapping) and dict in members:
        return dict(value)
    for member in members:
        if typing.get_origin(member) is list and isinstance(value, (list, tuple, str)):
            (item,) = typing.get_args(member)
            return [check(name, item, one) for one in ([value] if isinstance(value, str) else value)]
    return None


def _finite(value: Real) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float holds
        return None


def _check_plain(name: str, value: Any) -> None:
    """Numbers that 64 bits hold, text that files and terminals take: what goes wrong later would not name the field."""
    if type(value) is int and abs(value) >= _TOO_LARGE:
        raise UserError(f"{name}={shown(value)} must be a number of 64 bits; give a smaller one")
    if isinstance(value, str) and ("\x00" in value or not _is_unicode(value)):
        raise UserError(f"{name}={shown(value)} must be text of Unicode without NUL; write it anew")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)  # half a character


def shown(value: Any) -> str:
    """The value for an error's line, which must stay one that can be read."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of more than 4300 digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def check_range(spec: Field, value: Any) -> None:
    """Raises unless `value` (each, of a list) is one of the field's choices and inside its range; None always is."""
    rules = spec.metadata
    if value is None or "choices" not in rules:  # a field of a script's own dataclass has other metadata
        return
    for one in value if isinstance(value, list) else [value]:
        _check_one(spec.name, rules, one)


def _check_one(name: str, rules: Mapping[str, Any], value: Any) -> None:
    if rules["choices"] and value not in rules["choices"]:
        legal = ", ".join(repr(choice) for choice in rules["choices"])
        why = f" is refused: {rules['why']}" if rules["why"] else " is unknown"
        raise UserError(f"{name}={shown(value)}{why}; legal: {legal}")
    broken = [
        f"{sign} {rules[bound]}"
        for bound, sign, holds in (
            ("minimum", "at least", lambda limit: value >= limit),
            ("above", "above", lambda limit: value > limit),
            ("maximum", "at most", lambda limit: value <= limit),
            ("below", "below", lambda limit: value < limit),
        )
        if rules[bound] is not None and not holds(rules[bound])
    ]
    if broken:
        raise UserError(f"{name}={shown(value)} must be {' and '.join(broken)}; give another {name}")
