"""Conversations as tokens, and which of those tokens the assistant wrote.

Templates need no `{% generation %}` marks: a turn's tokens are found by comparing the rendered conversation
with the rendered turns before it, with and without the turn itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megalign.errors import UserError

Message = dict[str, Any]

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# A template computes with what a row holds: its own complaints, and those of the Python in it.
_OF_TEMPLATES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
# transformers reads the files' JSON as it finds it.
_OF_TOKENIZERS = (OSError, ValueError, TypeError, LookupError, AttributeError)
_TOKENIZERS_OWN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "chat_template",
    "documents",
    "kwargs",
}
_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # None would ask the terminal
    except _OF_TOKENIZERS as error:
        raise UserError(
            f"{path} holds no tokenizer that loads: {_first_line(error)}; give one of transformers' own classes, whose "
            "files are whole (code that comes with a model is not run)"
        ) from error


def special_tokens_of(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """Those that config files name as well, and that the tokenizer has."""
    found = {name: getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    return {name: token for name, token in found.items() if token is not None}


def adapt_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, eos_token: str | None = None, chat_template_path: str | None = None
) -> PreTrainedTokenizerBase:
    """The same tokenizer, changed to the end token and chat template that were asked for."""
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise UserError(f"eos_token={eos_token!r} is not in the vocabulary of {name}; name one of its tokens")
        tokenizer.eos_token = eos_token
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(chat_template_path)
    return tokenizer


def _read_template(path: str) -> str:
    if Path(path).suffix in (".jinja", ".j2"):
        if not Path(path).is_file():
            raise UserError(f"chat_template_path={path!r} does not exist; give a .jinja file or a tokenizer")
        return Path(path).read_text(encoding="utf-8")
    template = load_tokenizer(path).chat_template
    if template is None:
        raise UserError(f"chat_template_path={path!r} is a tokenizer without a chat template; name another")
    return template


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_conversation(value: Any) -> bool:
    """A list of messages: mappings with a role (or ShareGPT's `from`)."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and isinstance(value[0], Mapping)
        and ("role" in value[0] or "from" in value[0])
    )


def as_messages(conversation: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with `role` and `content`; ShareGPT's names are translated.

    Keys without a value go: a column of a table gives every message the keys of all, and templates ask
    whether a key such as tool_calls is there. Beside tool calls a content without a value stays: templates ask for it.
    """
    messages = []
    for index, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise UserError(f"message {index} must have role and content, and is a {type(message).__name__}; mend it")
        empty = "content" if message.get("tool_calls") else None
        kept = {key: value for key, value in message.items() if value is not None or key == empty}
        if "from" in kept:
            kept["role"] = kept.pop("from")
        if "value" in kept:
            kept["content"] = kept.pop("value")
        _check_message(kept, index)
        kept["role"] = _SHAREGPT_ROLES.get(kept["role"], kept["role"])
        messages.append(kept)
    return messages


def _check_message(message: Message, index: int) -> None:
    """A role, and text or parts: many templates would print a number or a mapping as Python does."""
    if "role" not in message:
        there = ", ".join(map(repr, message)) or "nothing"
        raise UserError(f"message {index} has no 'role', only {there}; say whose it is, e.g. 'user'")
    if not isinstance(message["role"], str):
        raise UserError(f"message {index}'s role {_shown(message['role'])} must be text; write e.g. 'user'")
    content = message.get("content", "")
    is_parts = isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content)
    if content is not None and not isinstance(content, str) and not is_parts:
        raise UserError(
            f"message {index}'s content {_shown(content)} must be text, or a list of parts that are mappings where the "
            "chat template takes them; mend the row"
        )


def _shown(value: Any) -> str:
    """The value for an error's line; a row's may be of any length."""
    text = repr(value)
    return f"{text if len(text) <= 100 else text[:100] + '...'} ({type(value).__name__})"


def check_template_arguments(arguments: Mapping[str, Any], what: str) -> None:
    """UserError for an argument that is apply_chat_template's own and would change what it returns."""
    for name in arguments:
        if name in _TOKENIZERS_OWN:
            raise UserError(
                f"{what} has {name!r}, which is the tokenizer's argument and not the template's; leave it out"
            )


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    options: Mapping[str, Any],
) -> list[int]:
    """The conversation through the chat template; `options` are `tools` and what else the template takes."""
    if tokenizer.chat_template is None:
        raise UserError("messages need a chat template and the tokenizer has none; chat_template_path gives one")
    options = {**options, "add_generation_prompt": add_generation_prompt}
    return _rendered(tokenizer, messages, return_dict=False, **options)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], /, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, **options)
    except _OF_TEMPLATES as error:
        raise UserError(
            f"the chat template refuses the messages: {_first_line(error)}; mend the row, its tools or its "
            "chat_template_kwargs, or name another template (chat_template_path)"
        ) from error


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, options: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """Tokens of the conversation, and True for those that the assistant wrote, end of turn included.

    Marks in the template decide where it has them. Otherwise a turn begins where the conversation leaves
    the render of the earlier turns with the generation prompt, and ends where the render of the turns up to
    it ends.
    """
    if tokenizer.chat_template is not None and _GENERATION_MARK.search(str(tokenizer.chat_template)):
        rendered = _rendered(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True, **options)
        return rendered["input_ids"], [bool(bit) for bit in rendered["assistant_masks"]]

    whole = chat_ids(tokenizer, messages, options=options)
    mask = [False] * len(whole)
    end = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _turn_start(tokenizer, messages, index, whole, end, options)
        end = _turn_end(tokenizer, messages, index, whole, start, options)
        mask[start:end] = [True] * (end - start)
    return whole, mask


_UNCLEAR = (
    "the chat template renders earlier turns anew after message {index}, so that the assistant's tokens "
    "cannot be told; chat_template_path can name a template with {{% generation %}} marks"
)


def _turn_start(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    index: int,
    whole: list[int],
    earlier: int,  # where the assistant's turn before this one ended
    options: Mapping[str, Any],
) -> int:
    if index > 0:
        before = chat_ids(tokenizer, messages[:index], add_generation_prompt=True, options=options)
        opening = len(chat_ids(tokenizer, messages[:index], options=options))
        start = common_prefix_length(before, whole)
        if start >= max(earlier, opening - 1):  # - 1: the last token before the opening may melt into it
            return start
        # An earlier turn looks different where it is the last: look for the next generation prompt instead.
        return _end_of(before[opening:], whole, earlier, index)
    # Many templates cannot render an empty list; the turn begins where another content makes a difference.
    content = str(messages[0].get("content", ""))
    other = "B" if content.lstrip()[:1] == "A" else "A"
    changed = [{**messages[0], "content": other}, *messages[1:]]
    return common_prefix_length(chat_ids(tokenizer, changed, options=options), whole)


def _turn_end(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    index: int,
    whole: list[int],
    start: int,
    options: Mapping[str, Any],
) -> int:
    until = chat_ids(tokenizer, messages[: index + 1], options=options)
    if whole[: len(until)] == until:
        return len(until)
    # A last turn may look different from an earlier one (Qwen3 drops the thoughts of earlier turns). It still
    # ends with the same end of turn: the last special token and what follows it.
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    last = max((place for place, token in enumerate(until) if token in special), default=0)
    ending = until[last:]
    return _end_of(ending if last >= start else [], whole, start, index)


def _end_of(part: list[int], whole: list[int], start: int, index: int) -> int:
    """Where the first occurrence of `part` from `start` on ends."""
    for place in range(start, len(whole) - len(part) + 1) if part else ():
        if whole[place : place + len(part)] == part:
            return place + len(part)
    raise UserError(_UNCLEAR.format(index=index))
