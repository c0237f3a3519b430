"""A prompt and what follows it, both text or both messages, as tokens; and where the completion begins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from megalign.data.chat import Message, chat_ids, check_template_arguments, common_prefix_length
from megalign.data.rows import Row
from megalign.errors import UserError

logger = logging.get_logger(__name__)

Words = str | list[Message]


class Completed(NamedTuple):
    """A sequence of tokens, of which the completion begins at `start`."""

    ids: list[int]
    start: int

    @property
    def mask(self) -> list[bool]:
        """True for the completion's tokens."""
        return [False] * self.start + [True] * (len(self.ids) - self.start)

    def cut(self, max_length: int | None, truncation_mode: str = "keep_start") -> Completed:
        """The first max_length tokens or, with keep_end, the last."""
        if max_length is None or len(self.ids) <= max_length:
            return self
        if truncation_mode == "keep_end":
            return Completed(self.ids[-max_length:], max(0, self.start - (len(self.ids) - max_length)))
        return Completed(self.ids[:max_length], min(self.start, max_length))


def template_options(row: Row) -> dict[str, Any]:
    """What a row brings for the chat template: its tools (a list or JSON text) and chat_template_kwargs."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"its 'tools' must be a list of tools or the JSON text of one: {error}") from error
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"its chat_template_kwargs={arguments!r} must be a mapping of names to values; mend the row")
    check_template_arguments(arguments, "its chat_template_kwargs")
    # `or None`: Llama's template describes how to call tools even when the list is empty.
    if tools and not _are_tools(tools):
        raise UserError(
            f"its 'tools' must be a list of mappings (JSON schemas) and is a {type(tools).__name__}; mend the row"
        )
    return {"tools": tools or None, **arguments}


def _are_tools(tools: Any) -> bool:
    return isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)


def ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with the tokenizer's end token behind it, unless it ends so."""
    if tokenizer.eos_token is None:
        raise UserError("text ends with the tokenizer's end token and it has none; eos_token names one")
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def prompt_tokens(prompt: Words, row: Row, tokenizer: PreTrainedTokenizerBase, **text_options: bool) -> list[int]:
    """The prompt alone: text as it is (`text_options` are the tokenizer's), messages with the generation prompt."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt, **text_options)["input_ids"]
    if not prompt:
        raise UserError(
            "its prompt has no messages: chosen and rejected must begin with the same ones, or a 'prompt' column "
            "give them; mend or drop the row"
        )
    return chat_ids(tokenizer, prompt, add_generation_prompt=True, options=template_options(row))


def whole_tokens(
    prompt: Words, completion: Words, row: Row, tokenizer: PreTrainedTokenizerBase, **text_options: bool
) -> list[int]:
    """Prompt and completion together; the end token is the completion's own or, of messages, the template's."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return tokenizer(text=prompt + completion, **text_options)["input_ids"]
    assert isinstance(prompt, list) and isinstance(completion, list), "both text or both messages"
    return chat_ids(tokenizer, prompt + completion, options=template_options(row))


def completion_start(prompt_ids: list[int], *wholes: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the completions begin: where the prompt alone and the first of `wholes` to leave it part.

    That may be within the prompt, when its last token melts into the completion or when the template renders
    a prompt alone differently.
    """
    start = min(common_prefix_length(prompt_ids, whole) for whole in wholes)
    if start < len(prompt_ids):
        logger.warning_once(
            f"a prompt's end, {tokenizer.decode(prompt_ids[start:])!r}, becomes other tokens when the "
            "completion follows: the model is trained on a prompt it will not see; end prompts where a token "
            "ends (shown once)"
        )
    return start


def check_completion(completed: Completed, name: str) -> None:
    """UserError for a completion that no token is learnt of; the caller adds the row's number to the error.

    Means over its tokens would be 0 / 0. A sequence's first token does not count: nothing predicts it.
    """
    learnt = len(completed.ids) - max(completed.start, 1)
    if learnt < 1:
        raise UserError(
            f"its {name} has no token to learn of ({len(completed.ids)} tokens with the prompt, which has "
            f"{completed.start}); fill it in or drop the row"
        )
