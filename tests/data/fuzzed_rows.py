"""Rows of every format of the eight trainers, and what a fuzzer makes of them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from hypothesis import strategies as st

VOCAB = 420  # of tests.data.tokenizers_made_here

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because of the air."}
OTHER = {"role": "assistant", "content": "It is blue."}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "x", "parameters": {"type": "object"}}}]
_TEXTS = {"prompt": "What color is", "chosen": " the sky?", "rejected": " the dog?"}
_TALK = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
_WHOLE_TALK = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
_IDS = {"prompt_ids": [300, 301], "chosen_ids": [302, 303, 0], "rejected_ids": [304, 0]}

PAIRS: dict[str, dict[str, Any]] = {
    "text": _TEXTS,
    "text without a prompt": {"chosen": "one two three", "rejected": "one two four"},
    "messages": _TALK | {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
    "messages without a prompt": _WHOLE_TALK,
    "tokens": _IDS,
}
FORMATS: dict[str, dict[str, dict[str, Any]]] = {
    "SFT": {
        "text": {"text": "The quick brown fox"},
        "prompt and completion": {"prompt": "1 + 2 =", "completion": " 3"},
        "messages apart": {"prompt": [USER], "completion": [ANSWER]},
        "messages": {"messages": [USER, ANSWER, USER, OTHER], "tools": TOOLS},
        "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        "masks": {
            "input_ids": [300, 301, 302, 303],
            "completion_mask": [0, 0, 1, 1],
            "assistant_masks": [0, 1, 1, 1],
            "attention_mask": [1, 1, 1, 1],
        },
        "labels": {"input_ids": [300, 301, 302, 303], "labels": [-100, -100, 302, 303]},
    },
    "Reward": {**{name: PAIRS[name] | {"margin": 0.5} for name in PAIRS if name != "tokens"}, "tokens": {
        "chosen_ids": [300, 301, 302], "rejected_ids": [300, 303], "margin": 1.0}},
    "DPO": PAIRS,
    "ORPO": PAIRS,
    "KTO": {
        "text": {"prompt": "What color is", "completion": " the sky?", "label": True},
        "messages": {"prompt": [USER], "completion": [ANSWER], "label": False},
        "pairs": _TEXTS,
        "pairs of messages": _WHOLE_TALK,
        "tokens": {"prompt_ids": [300, 301], "completion_ids": [302, 303], "label": True},
    },
    "prompts": {  # PPO, GRPO and RLOO prepare their rows alike
        "text": {"prompt": "What color is", "answer": 3},
        "messages": {"prompt": [USER], "answer": "blue"},
    },
}  # fmt: skip
CASES = [(kind, name) for kind, formats in FORMATS.items() for name in formats]

_WORDS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "<|im_start|>assistant\n",
    "<|endoftext|>",
    "{{ 7 * 7 }}{% endfor %}",
    "{",
    "[1, 2]",
    '{"a": 1}',
    "a" * 3000,
    "\u202e\U0001f600\u0301",
]
_NAMES = ["text", "prompt", "completion", "chosen", "rejected", "label", "messages", "input_ids", "chosen_ids", "tools",
          "prompt_ids", "completion_mask", "chat_template_kwargs", "margin", "role", "content", "from"]  # fmt: skip
_OPTIONS = ["padding", "return_tensors", "tokenize", "continue_final_message", "max_length", "truncation", "documents",
            "messages", "conversation", "chat_template", "tokenizer", "add_generation_prompt", "tools"]  # fmt: skip

_plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 500),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from(_WORDS),
    st.text(alphabet=st.characters(codec=None), max_size=8),
    st.binary(max_size=4),
    st.just(datetime.datetime(2020, 2, 29)),
)
junk = st.recursive(
    _plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*_NAMES, "", "x y"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_numbers = st.sampled_from([-1, 2, 0.5, VOCAB - 1, VOCAB, -100, 2**31, True, None, "1", float("nan")])
_options = st.dictionaries(st.sampled_from(_OPTIONS), junk, min_size=1, max_size=2)
Place = tuple[Any, ...]


@st.composite
def malformed(draw: st.DrawFn, good: Mapping[str, Any]) -> dict[str, Any]:
    """The row with one to three of its values replaced, removed, doubled or joined by others."""
    row: dict[str, Any] = deepcopy(dict(good))
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["replace", "number", "number", "remove", "double", "add", "options", "long"]))
        *way, last = draw(st.sampled_from(list(_places(row)) or [("text",)]))
        around: Any = row
        for step in way:
            around = around[step]
        if how == "add" or not row:
            row[draw(st.sampled_from(_NAMES))] = draw(junk)
        elif how == "number" and type(around[last]) in (int, float, bool):
            around[last] = draw(_numbers)
        elif how == "options":
            row["chat_template_kwargs"] = draw(_options)
        elif how == "remove":
            del around[last]
        elif how == "double" and isinstance(around, list):
            around.insert(last, deepcopy(around[last]))
        elif how == "long" and isinstance(around, list):
            around[last:last] = [deepcopy(around[last]) for _ in range(40)]
        else:
            around[last] = draw(junk)
    return row


def _places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Where the value has values, at any depth."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in parts:
        yield (*before, name)
        yield from _places(inner, (*before, name))


# ---- what no reader may let pass, by rules that are written down here once more


class Columns(NamedTuple):
    """Which columns of a format hold what."""

    words: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


def columns_of(kind: str, name: str) -> Columns:
    good = FORMATS[kind][name]
    words = [key for key in ("text", "prompt", "completion", "chosen", "rejected", "messages", "conversations")
             if key in good]  # fmt: skip
    return Columns(tuple(words), tuple(key for key in good if key.endswith("_ids")))


def is_plainly_wrong(row: Mapping[str, Any], columns: Columns) -> bool:
    """Whether a needed column lacks, or holds neither text nor messages, or no ids of the vocabulary."""
    if any(not _are_ids(row.get(name)) for name in columns.tokens):
        return True
    masks = [name for name in ("attention_mask", "assistant_masks") if columns.tokens and row.get("labels") is None]
    if any(row.get(name) is not None and not _are_bits(row[name], len(row["input_ids"])) for name in masks):
        return True
    # Another format may be complete where this one's column is gone: that is not looked at here.
    return any(name in row and row[name] is not None and not _are_words(row[name]) for name in columns.words)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < VOCAB for one in value)


def _are_bits(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(bit in (0, 1) for bit in value)


def _are_words(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(one, dict) and _is_message(one) for one in value)


def _is_message(value: dict[str, Any]) -> bool:
    role = value.get("role") if value.get("from") is None else value["from"]
    content = value.get("content") if value.get("value") is None else value["value"]
    return isinstance(role, str) and (content is None or isinstance(content, str | list))
