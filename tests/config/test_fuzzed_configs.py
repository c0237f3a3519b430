"""A fuzzer's fields of all eight configs, from constructors, flags and YAML: refused in a sentence, or of their type.

What a field may hold is asked of its annotation and its range here once more, not of the code that is tested.
"""

from __future__ import annotations

import math
import os
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megalign import config as configs
from megalign.cli import parse_arguments
from megalign.errors import UserError
from tests.fuzzing import fuzzing

CONFIGS = [getattr(configs, f"{kind}Config") for kind in ("SFT", "Reward", "DPO", "KTO", "ORPO", "PPO", "GRPO", "RLOO")]
EXAMPLES = 14  # of 8 configs in 3 ways: 336
LONGEST_LINE = 4000

_TEXTS = ["", "nan", "inf", "-inf", "1e400", "-1", "0", "None", "true", "yes", "[1, 2", "{a: 1}", "[]", "*a", "!!x y",
          "\x00", "\ud800", "\u0663", "1_000", "2020-13-45", "9" * 5000, "&a [*a]", "a" * 9999, "- -", "\n", ": :",
          "!!python/object/apply:os.system [exit 3]", "&a [&b [*a]]", "\U0001f600", "--x", "%", "@", "0x1F",
          "1:30"]  # fmt: skip
_NUMBERS = [0, 1, 2, 3, 7, -1, -2, 2**31, 2**32, 2**63, 10**30, 10**400, -(10**400), 0.0, 0.5, 1.5, -0.5, 1e308, 5e-324]
_NAMES = ["", "-", "no_", "no_bf16", "config", "env", "self", "__class__", "learning_rte", "fp16", "deepspeed", "tools",
          "\x00", "\ud800", "a b", "a=b", "\u00e9", "LEARNING_RATE", "1", "None", "check_values",
          "x" * 5000]  # fmt: skip
_plain = st.one_of(
    st.sampled_from(_NUMBERS), st.floats(), st.booleans(), st.none(), st.sampled_from(_TEXTS), st.text(max_size=5)
)
junk = st.recursive(
    _plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | _plain, inner, max_size=2),
    max_leaves=5,
)


def names_of(config: type) -> st.SearchStrategy[str]:
    known = sorted([spec.name for spec in fields(config)])
    return st.one_of(*[st.sampled_from(known)] * 5, st.sampled_from(_NAMES))


def outcome(make: Any, world: int) -> Any:
    """The config, or None where one sentence refuses it."""
    try:
        args = make()
        args.validate(world)
    except UserError as error:
        said = str(error)
        assert "\n" not in said and 20 < len(said) < LONGEST_LINE, said[:LONGEST_LINE]
        assert ";" in said or ":" in said, said  # the value and its rule, and a way out
        return None
    return args


def check_accepted(args: Any) -> None:
    """Every field is of its annotation and in its range."""
    annotations = typing.get_type_hints(type(args))
    for spec in fields(args):
        value = getattr(args, spec.name)
        assert is_of(annotations[spec.name], value), f"{spec.name}={value!r}"
        for one in value if isinstance(value, list) else [value]:
            low, high = spec.metadata.get("minimum"), spec.metadata.get("maximum")
            assert one is None or low is None or one >= low, f"{spec.name}={value!r}"
            assert one is None or high is None or one <= high, f"{spec.name}={value!r}"


def is_of(annotation: Any, value: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(member, value) for member in typing.get_args(annotation))
    if origin is list:
        return isinstance(value, list) and all(is_of(typing.get_args(annotation)[0], one) for one in value)
    if origin is dict:
        return isinstance(value, dict)
    if annotation is float:
        return type(value) is float and math.isfinite(value)
    if annotation is str:
        return type(value) is str and "\x00" not in value and value == value.encode(errors="ignore").decode()
    if annotation is int:
        return type(value) is int and abs(value) < 2**63
    return type(value) is annotation or (annotation is Any) or (annotation is type(None) and value is None)


worlds = st.sampled_from([1, 2, 6, 8])


@pytest.mark.parametrize("config", CONFIGS)
def test_a_fuzzed_constructor_is_refused_in_a_sentence_or_right(config: type) -> None:
    @fuzzing(EXAMPLES)
    @given(st.dictionaries(names_of(config), junk, min_size=1, max_size=2), worlds)
    def run(values: dict[str, Any], world: int) -> None:
        args = outcome(lambda: config(**values), world)
        if args is not None:
            check_accepted(args)

    run()


@pytest.mark.parametrize("config", CONFIGS)
def test_fuzzed_flags_are_refused_in_a_sentence_or_right(config: type) -> None:
    words = st.lists(
        st.sampled_from(_TEXTS) | st.text(max_size=4) | st.sampled_from(_NUMBERS[:10]).map(str), max_size=2
    )

    @fuzzing(EXAMPLES)
    @given(st.lists(st.tuples(names_of(config), words, st.booleans()), min_size=1, max_size=2), worlds)
    def run(flags: list[tuple[str, list[str], bool]], world: int) -> None:
        argv: list[str] = []
        for name, given_words, joined in flags:
            first = [f"--{name}={given_words[0]}"] if joined and given_words else [f"--{name}", *given_words[:1]]
            argv += [*first, *given_words[1:]]
        args = outcome(lambda: parse_arguments(config, argv), world)
        if args is not None:
            check_accepted(args)

    run()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_fuzzed_file_is_refused_in_a_sentence_or_right(
    config: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = tmp_path / "run.yaml"
    lines = st.lists(st.tuples(names_of(config), st.sampled_from(_TEXTS) | junk.map(as_yaml)), min_size=1, max_size=3)

    @fuzzing(EXAMPLES)
    @given(lines, worlds)
    def run(given_lines: list[tuple[str, str]], world: int) -> None:
        text = "".join(f"{name}: {value}\n" for name, value in given_lines)
        file.write_bytes(text.encode(errors="surrogatepass"))
        args = outcome(lambda: parse_arguments(config, ["--config", str(file)]), world)
        if args is not None:
            check_accepted(args)

    run()


def as_yaml(value: Any) -> str:
    """In one line, as somebody would write it."""
    try:
        return yaml.dump(value, default_flow_style=True, width=10**9).split("\n")[0]
    except ValueError:  # a whole number of more digits than Python writes
        return "9" * 5000


# ---- files that are meant to do harm

NEW = "\n"
LAUGHS = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else 'ha'] * 9)}]\n" for n in range(12))
HARMFUL: dict[str, tuple[bytes, str]] = {
    "a call": (b"learning_rate: !!python/object/apply:os.system ['touch HARM']\n", "tag:yaml.org,2002:python"),
    "a call by name": (b"!!python/name:os.system\n", "tag:yaml.org,2002:python"),
    "a new object": (b"output_dir: !!python/object/new:os.system ['touch HARM']\n", "tag:yaml.org,2002:python"),
    "a module": (b"output_dir: !!python/module:antigravity\n", "tag:yaml.org,2002:python"),
    "a billion laughs": (f"{LAUGHS}report_to: *x11\n".encode(), "aliases stand for more than 100000 values"),
    "laughs in a mapping": (f"generation_kwargs:\n  {LAUGHS.rstrip().replace(NEW, NEW + '  ')}\n".encode(), "aliases"),
    "itself": (b"generation_kwargs: &a {b: *a}\n", "holds itself"),
    "depth": (b"generation_kwargs: " + b"[" * 3000 + b"]" * 3000 + b"\n", "nested too deep"),
    "a number of 5000 digits": (b"seed: " + b"9" * 5000 + b"\n", "digits"),
    "no day": (b"run_name: 2020-13-45\n", "month must be in 1..12"),
    "a key that is a list": (b"? [1]\n: 2\n", "unhashable"),
    "twice": (b"seed: 1\nseed: 2\n", "given twice"),
    "twice, spelt otherwise": (b"max-steps: 1\nmax_steps: 2\n", "given twice"),
    "bytes": (b"\xff\xfe\x00run", "not YAML"),
    "a nul": (b"output_dir: \"a\\0b\"\n", "output_dir="),
    "a list": (b"- 1\n", "holds a list"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "single document"),
    "an unknown alias": (b"seed: *nowhere\n", "undefined alias"),
    "a bad environment": (b"env: {\"A=B\": 1}\n", "A=B"),
    "an environment with a nul": (b"env: {A: \"b\\0\"}\n", "env"),
    "an environment without a name": (b"env: {\"\": 1}\n", "env"),
    "an environment of lists": (b"env: [1]\n", "must be a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_file_is_refused_in_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, part = HARMFUL[name]
    Path("run.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        parse_arguments(configs.GRPOConfig, ["--config", "run.yaml"])
    said = str(caught.value)
    assert part in said and "\n" not in said and len(said) < LONGEST_LINE, said[:LONGEST_LINE]
    assert os.listdir() == ["run.yaml"]


@pytest.mark.parametrize("path", [".", "nowhere.yaml", "a\x00b"])
def test_a_file_that_cannot_be_read_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--config .*; give the path of a YAML file"):
        parse_arguments(configs.SFTConfig, ["--config", path])
