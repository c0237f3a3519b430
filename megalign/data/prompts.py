"""Rows to sample completions for: prompts as tokens, the other columns kept for the reward functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megalign.data.broken import Skipped, map_rows
from megalign.data.chat import as_messages, chat_ids, check_template_arguments, is_conversation
from megalign.data.rows import TOKENS, Row, check_tokens, naming_row, needed
from megalign.errors import UserError


def prepare_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    *,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    skipped: Skipped | None = None,
) -> Dataset:
    """Rows with a `prompt` (text or messages) -> the same rows with `prompt_ids`, every other column kept.

    A prompt must leave room for max_completion_length in vllm_max_model_length or, if that is not set, in the
    model's `max_positions`; its tokens must be below the model's `vocab_size`, where that is given. Rows that are
    refused are an error or, with `skipped`, left out and noted there.
    """
    if "prompt" not in dataset.column_names:
        columns = ", ".join(map(repr, dataset.column_names))
        raise UserError(f"dataset row 0: it has no 'prompt', only {columns}; add or rename the column")
    room = max_positions if args.vllm_max_model_length is None else args.vllm_max_model_length
    limit = None if room is None else room - args.max_completion_length
    if limit is not None and limit < 1:
        raise UserError(
            f"max_completion_length={args.max_completion_length} leaves no room for prompts in {room} "
            "positions; lower it"
        )
    check_template_arguments(args.chat_template_kwargs or {}, "chat_template_kwargs")
    return map_rows(
        dataset,
        prompt_row,
        features={"prompt_ids": TOKENS},
        keep_columns=True,
        skipped=skipped,
        options={
            "tokenizer": tokenizer,
            "options": args.chat_template_kwargs or {},
            "limit": limit,
            "vocab_size": vocab_size,
        },
        desc="Tokenizing prompts",
    )


def prompt_row(
    row: Row,
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    limit: int | None,
    vocab_size: int | None,
) -> dict[str, list[int]]:
    """One row -> its `prompt_ids`; an error names the row by its number, counted from 0."""
    with naming_row(index):
        ids = _prompt_ids(needed(row, "prompt"), tokenizer, options)
        check_tokens(ids, vocab_size)
        if limit is not None and len(ids) > limit:
            raise UserError(
                f"its prompt has {len(ids)} tokens and the limit is {limit} (the model's length less "
                "max_completion_length); shorten it, raise vllm_max_model_length or lower max_completion_length"
            )
    return {"prompt_ids": ids}


def _prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[int]:
    if is_conversation(prompt):
        ids = chat_ids(tokenizer, as_messages(prompt), add_generation_prompt=True, options=options)
    elif isinstance(prompt, str):
        ids = tokenizer(text=prompt)["input_ids"]
    else:
        raise UserError(
            f"its prompt must be text or a list of messages, not {type(prompt).__name__}; mend or drop the row"
        )
    if not ids:
        raise UserError("its prompt has no tokens; give some text")
    return ids
