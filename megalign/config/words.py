"""Fields of one or several dataclasses, from command-line words and YAML files."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from megalign.config.base import Config, hints, known_values, specs, unknown_name
from megalign.config.values import LONGEST, asked_for, check, kinds, parse, shown
from megalign.config.yaml_text import YamlError, from_yaml, load_yaml
from megalign.errors import UserError


class Words:
    """Reads what `--field value` words and YAML files say of the fields of `classes`, and fills these in.

    A field that several classes have is given to all of them. A name that one has and another refuses (TRL's
    `datasets`, say) is a field.
    """

    def __init__(self, classes: Sequence[type]) -> None:
        self.classes = list(classes)
        self.annotations: dict[str, Any] = {}
        for cls in reversed(self.classes):
            annotations = hints(cls)
            self.annotations |= {name: annotations[name] for name, spec in specs(cls).items() if spec.init}

    def values(
        self, argv: Sequence[str], *, unknown: list[str] | None = None, unknown_in_file: list[str] | None = None
    ) -> dict[str, Any]:
        """The values of `--config FILE` and `--field value` words; words win over the file.

        Unknown names are an error, or go with their values to the lists where these are given.
        """
        values: dict[str, Any] = {}
        given = self._words_by_name(argv, unknown)
        if "config" in given:
            (path, *more) = given.pop("config") or [""]
            if more or not path:
                raise UserError(
                    f"--config takes one YAML file, not {shown(' '.join([path, *more]))}; give --config run.yaml"
                )
            values = self.read_yaml(path, unknown_in_file)
        return values | {name: self._value_of(name, words) for name, words in given.items()}

    def read_yaml(self, path: str, unknown: list[str] | None = None) -> dict[str, Any]:
        """The fields of a flat YAML file; its `env` mapping goes into the environment."""
        loaded = _load(path)
        _set_environment(path, loaded.get("env") or {})
        values: dict[str, Any] = {}
        for key, value in loaded.items():
            name = str(key).replace("-", "_")
            if name in values:
                raise UserError(f"{name} is given twice in {path}, with - and with _; give it once")
            if name != "env":
                values[name] = value
        for name, value in list(values.items()):
            if not self.knows(name):
                if unknown is None:
                    raise UserError(f"{unknown_name(self.classes, name, others=('env',))} (in {path})")
                unknown += [f"--{name}", str(values.pop(name))]
            # "1e-5" in quotes, or None, means the same as on the command line.
            elif isinstance(value, str) and name in self.annotations:
                values[name] = parse(name, self.annotations[name], value)
        return values

    def knows(self, name: str) -> bool:
        """Whether it is a field of any of the classes, or refused by one with a reason."""
        return name in self.annotations or any(name in _refused(cls) for cls in self.classes)

    def fill(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """An instance of each class."""
        return tuple(self._made(cls, values) for cls in self.classes)

    def _made(self, cls: type, values: Mapping[str, Any]) -> Any:
        known, refused = specs(cls), _refused(cls)
        mine = {name: value for name, value in values.items() if name in known}
        mine |= {name: values[name] for name in values if name in refused and name not in self.annotations}
        for name, spec in known.items():
            if spec.init and name not in mine and spec.default is MISSING and spec.default_factory is MISSING:
                raise UserError(f"{name} is not given, which {cls.__name__} needs; give --{name}")
        if issubclass(cls, Config):  # it checks its values, but a script's subclass of one does not know refused names
            return cls(**known_values(cls, mine))
        annotations = hints(cls)
        return cls(**{name: check(name, annotations[name], value) for name, value in mine.items()})

    def _words_by_name(self, argv: Sequence[str], unknown: list[str] | None) -> dict[str, list[str]]:
        """`--name word ...` and `--name=word` with - and _ alike -> name: words; names are checked here."""
        given: dict[str, list[str]] = {}
        current = unknown
        for word in argv:
            if not word.startswith("--"):
                if current is None:
                    raise UserError(f"{shown(word)} stands before any --field; write --field VALUE")
                current.append(word)
                continue
            flag, equals, value = word[2:].partition("=")
            name, said = self._name_of(flag.replace("-", "_"))
            if name in given:
                raise UserError(f"--{name} is given twice; give it once, with all of its values")
            if name is not None:
                current = given[name] = [value] if equals else said
            elif unknown is None:
                raise unknown_name(self.classes, flag.replace("-", "_"), others=("config",))
            else:
                unknown.append(word)
                current = unknown
        return given

    def _name_of(self, name: str) -> tuple[str | None, list[str]]:
        """The field that a flag means, and the words that it stands for: --no_x is --x False, as in TRL."""
        if name == "config" or self.knows(name):
            return name, []
        positive = name.removeprefix("no_")
        is_boolean = bool in kinds(self.annotations[positive])[0] if positive in self.annotations else True
        if positive != name and self.knows(positive) and is_boolean:
            return positive, ["False"]
        return None, []

    def _value_of(self, name: str, words: list[str]) -> Any:
        """What the words after --name mean; none is a bare boolean."""
        if name not in self.annotations:
            return from_yaml(" ".join(words)) if words else True
        annotation = self.annotations[name]
        members, _ = kinds(annotation)
        if not words:
            if bool in members:
                return True
            raise UserError(f"--{name} has no value; it must be {asked_for(annotation)}")
        if len(words) == 1:
            return parse(name, annotation, words[0])
        lists = [member for member in members if typing.get_origin(member) is list]
        if not lists:
            raise UserError(
                f"--{name} {' '.join(words)[:LONGEST]}: one value is wanted, {asked_for(annotation)}; quote it if it is"
            )
        return [item for word in words for item in parse(name, lists[0], word)]


def _refused(cls: type) -> Mapping[str, Any]:
    return cls.refused if issubclass(cls, Config) else {}


def _load(path: str) -> Mapping[Any, Any]:
    try:
        loaded = load_yaml(_text_of(path)) or {}
    except (YamlError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}; write `field: value` lines") from error
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"--config {path} holds a {type(loaded).__name__}, not fields; write `field: value` lines")
    return loaded


def _text_of(path: str) -> str:
    if "\x00" in path:
        raise UserError(f"{path!r} is no path; give the path of a YAML file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.strerror}; give the path of a YAML file") from error


def _set_environment(path: str, variables: Any) -> None:
    if not isinstance(variables, Mapping):
        raise UserError(
            f"env: {shown(variables)} in {path} must be a mapping of variables to values; write env: {{NAME: 1}}"
        )
    texts = {str(name): str(value) for name, value in variables.items()}
    for name, value in texts.items():
        if not name or "=" in name or "\x00" in name + value:
            raise UserError(
                f"env: {shown({name: value})} in {path} is no variable: its name must be there and hold no =, and "
                "neither may hold NUL; write env: {NAME: 1}"
            )
    os.environ.update(texts)
