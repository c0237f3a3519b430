"""YAML from a stranger's file: plain values only, one line about what is wrong, no aliases that grow without bound.

Standard library only; yaml is imported when something is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from megalign.errors import UserError

_MOST_VALUES = 100_000  # aliases of aliases double with each line; a run has some hundred fields


class YamlError(ValueError):
    """The text is no YAML, or YAML of what no field holds; the reason on one line."""


def load_yaml(text: str) -> Any:
    """yaml.safe_load that also knows 1e-5 as a number, which YAML 1.1 takes for text, and refuses a key that a
    mapping has twice, of which the last would win.
    """
    import yaml

    try:
        loaded = yaml.load(text, _loader())  # a SafeLoader: no tag makes an object or calls a function
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day that there is not, a number of 5000 digits
        raise YamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlError("it is nested too deep") from error
    _check_size(loaded)
    return loaded


@functools.cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)  # before `<<` brings in keys that may be overridden
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(names)) < len(names):
                name = next(name for place, name in enumerate(names) if name in names[:place])
                raise UserError(f"{name!r} is given twice in one mapping; give it once")
            return node

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _check_size(loaded: Any) -> None:
    """UserError for a value that its aliases make endless, or so large that nobody could print it."""
    count, around, left = 0, set(), [(loaded, False)]
    while left:
        value, is_done = left.pop()
        if not isinstance(value, list | Mapping):
            continue
        if is_done:
            around.remove(id(value))
            continue
        if id(value) in around:
            raise YamlError("a value holds itself by an alias")
        around.add(id(value))
        left.append((value, True))
        inner = list(value.values()) if isinstance(value, Mapping) else value
        left += [(one, False) for one in inner]
        count += len(inner)
        if count > _MOST_VALUES:
            raise YamlError(f"its aliases stand for more than {_MOST_VALUES} values")


def from_yaml(text: str) -> Any:
    """The YAML value of one command-line word, or the word itself when it is not YAML; None may be spelt
    None.
    """
    try:
        loaded = load_yaml(text)
    except YamlError:
        return text
    return None if loaded == "None" else loaded
