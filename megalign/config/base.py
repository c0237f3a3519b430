"""The base of every config class: unknown and refused names, values, choices and ranges are checked at once.

Imports neither torch nor transformers: `--help` and a wrong flag answer in a fraction of a second.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, TypeVar, dataclass_transform

from megalign.config.refused import RENAMED, Refusal, is_inert
from megalign.config.values import check, check_range, shown
from megalign.errors import UserError

_LONGEST_NAME = 100  # no field's is near it

C = TypeVar("C", bound=type)


@dataclass_transform(kw_only_default=True)
def config(cls: C) -> C:
    """`@dataclass(kw_only=True)` whose constructor names an unknown or a refused field instead of raising
    TypeError."""
    cls = dataclass(kw_only=True)(cls)
    generated = cls.__init__

    @functools.wraps(generated)
    def checked_init(self: Config, /, *positional: Any, **values: Any) -> None:
        if positional:
            raise UserError(
                f"{type(self).__name__}({shown(positional[0])}): fields are given by name; "
                f"write output_dir={shown(positional[0])} if that is what is meant"
            )
        generated(self, **known_values(type(self), values))

    cls.__init__ = checked_init
    return cls


class Config:
    """What all configs share; holds no field of its own."""

    refused: ClassVar[Mapping[str, Refusal]] = {}

    def __post_init__(self) -> None:
        self.check_values()

    def __setattr__(self, name: str, value: Any) -> None:
        # A field set after construction must not be dropped in silence either.
        if name not in specs(type(self)):
            known_values(type(self), {name: value})
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """A refused field reads as the value that asks for nothing: TRL's scripts look at push_to_hub and its like."""
        refusal = type(self).refused.get(name)
        if refusal is None or not refusal.inert:
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        return refusal.inert[0]

    def check_values(self) -> None:
        """Brings every field into its form and checks type, choices and range."""
        annotations = hints(type(self))
        for spec in fields(self):
            value = check(spec.name, annotations[spec.name], getattr(self, spec.name))
            check_range(spec, value)
            setattr(self, spec.name, value)

    def validate(self, world_size: int) -> None:
        """Checks all that can be known without torch for a job of `world_size` ranks."""
        if world_size < 1:
            raise UserError(f"world size {world_size} must be at least 1; start one rank or more")
        self.check_values()


def known_values(cls: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of known fields; a refused name passes (and is dropped) only with a value that asks for
    nothing."""
    known = specs(cls)
    for name, value in values.items():
        if name in known:
            continue
        if name not in cls.refused:
            raise unknown_name([cls], name)
        refusal = cls.refused[name]
        if not is_inert(refusal, value):
            raise UserError(f"{name}={shown(value)} is refused: {refusal}")
    return {name: value for name, value in values.items() if name in known}


def field_of(cls: type[Config], name: str) -> str | None:
    """The config's field of this name, or of the name that this one has now."""
    known = specs(cls)
    return name if name in known else present_name(name, known)


def present_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that an earlier version's has now."""
    return next((word for word in RENAMED.get(name, ()) if word in known), None)


def unknown_name(classes: Sequence[type], name: str, others: Iterable[str] = ()) -> UserError:
    """The error for a name that is no field of any of the classes and not refused, with the nearest right one."""
    known = [field_name for cls in classes for field_name in specs(cls)]
    owners = " or ".join(cls.__name__ for cls in classes)
    if not name.isidentifier() or len(name) > _LONGEST_NAME:
        return UserError(f"{shown(name)} is no name of a field of {owners}; --help lists every field")
    present = present_name(name, known)
    if present is not None:
        return UserError(f"{name} is not a field of {owners}: its name is {present}; write {present}")
    # "batch_size" should find per_device_train_batch_size, which difflib's ratio alone ranks low.
    near = difflib.get_close_matches(name, [*known, *others], n=1)
    near = near or [field_name for field_name in known if name in field_name][:1]
    meant = f"did you mean {near[0]}?" if near else "--help lists every field"
    return UserError(f"{name} is not a field of {owners}; {meant}")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Resolved annotations by field name, of a config or of a script's own dataclass."""
    return typing.get_type_hints(cls)


@functools.cache
def specs(cls: type) -> dict[str, Field]:
    """Dataclass fields by name."""
    return {spec.name: spec for spec in fields(cls)}


def default_of(spec: Field) -> Any:
    """A field's default; every config field has one."""
    return spec.default if spec.default is not MISSING else spec.default_factory()


@functools.cache
def docs(cls: type[Config]) -> dict[str, str]:
    """The string under each field, on one line, by field name; a subclass's own text wins."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if issubclass(owner, Config) and owner is not Config:
            found |= _docs_of(owner)
    return found


def _docs_of(owner: type) -> dict[str, str]:
    """The strings under the fields that `owner` itself declares."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    found = {}
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            found[statement.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found
