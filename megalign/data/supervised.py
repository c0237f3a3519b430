"""Rows of every format that SFT takes, as tokens and loss masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from megalign.data.broken import Skipped, map_rows
from megalign.data.chat import as_messages, assistant_tokens, chat_ids, is_conversation
from megalign.data.completions import Completed, completion_start, ended, template_options
from megalign.data.packing import pack_dataset
from megalign.data.rows import MASK, TOKENS, Row, as_long, check_tokens, mask_bits, naming_row, needed, needed_ids
from megalign.errors import UserError

logger = logging.get_logger(__name__)

IGNORED = -100  # Hugging Face's label of a token that is not in the loss


class SFTFormat(NamedTuple):
    """How rows become tokens; the fields of SFTConfig that matter for it."""

    text_field: str
    completion_only_loss: bool | None
    assistant_only_loss: bool


def prepare_sft(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    args: Any,
    *,
    packing: bool | None = None,
    vocab_size: int | None = None,
    skipped: Skipped | None = None,
) -> Dataset:
    """Rows of any SFT format -> `input_ids` and `loss_mask` (with packing also `seq_lengths`), cut to max_length.

    `packing` overrides args.packing (evaluation). Rows without a loss token are dropped and counted; with packing,
    packs without one. Tokenized rows (`input_ids`) need no tokenizer. Tokens must be below the model's `vocab_size`,
    where that is given. Rows that are refused are an error or, with `skipped`, left out and noted there.
    """
    form = SFTFormat(args.dataset_text_field, args.completion_only_loss, args.assistant_only_loss)
    if "input_ids" not in dataset.column_names and tokenizer is None:
        raise UserError("rows without input_ids need a tokenizer and the model has none; give tokenized rows")
    rows = map_rows(
        dataset,
        tokenized_row,
        features={"input_ids": TOKENS, "loss_mask": MASK},
        options={"tokenizer": tokenizer, "form": form, "vocab_size": vocab_size},
        skipped=skipped,
        num_proc=args.dataset_num_proc,
        desc="Tokenizing",
    )
    if args.packing if packing is None else packing:
        # Neighbours in the file may be alike; a pack of them would correlate what a microbatch learns from.
        rows = rows.shuffle(seed=args.data_order_seed) if args.shuffle_dataset else rows
        packs = pack_dataset(rows, args.max_length, args.packing_strategy)
        return _with_loss_tokens(packs, "packs", args)
    return _with_loss_tokens(_cut(rows, args), "rows", args)


def _cut(rows: Dataset, args: Any) -> Dataset:
    max_length = args.max_length
    if max_length is None:
        return rows
    kept = slice(-max_length, None) if args.truncation_mode == "keep_end" else slice(max_length)
    return rows.map(
        lambda row: {name: row[name][kept] for name in ("input_ids", "loss_mask")},
        num_proc=args.dataset_num_proc,
        desc="Cutting",
    )


def _with_loss_tokens(rows: Dataset, called: str, args: Any) -> Dataset:
    """The rows (or packs, as they are `called`) that have a loss token; the others are counted, none left is an
    error.
    """
    trained = rows.filter(
        lambda row: any(row["loss_mask"]),
        num_proc=args.dataset_num_proc,
        desc=f"Dropping {called} without a loss token",
    )
    if len(trained) == 0 and len(rows) > 0:
        raise UserError(
            f"none of the {len(rows)} {called} has a loss token within max_length={args.max_length} tokens; raise it, "
            "or mend the rows' masks"
        )
    if len(trained) < len(rows):
        logger.warning("%d of %d %s have no loss token and are dropped", len(rows) - len(trained), len(rows), called)
    return trained


def tokenized_row(
    row: Row, index: int, *, tokenizer: PreTrainedTokenizerBase | None, form: SFTFormat, vocab_size: int | None
) -> dict[str, list[Any]]:
    """One row -> its `input_ids` and `loss_mask`; an error names the row by its number, counted from 0."""
    with naming_row(index):
        if "input_ids" in row:
            tokenized = _from_tokens(row, form)
        else:
            assert tokenizer is not None, "checked for the dataset"
            tokenized = _from_text(row, tokenizer, form)
        check_tokens(tokenized["input_ids"], vocab_size)
    return tokenized


def _from_tokens(row: Row, form: SFTFormat) -> dict[str, list[Any]]:
    """`labels` decide where there are any; else completion_mask (unless completion_only_loss=False) and
    assistant_masks.

    TRL lets completion_mask count only where completion_only_loss is given, and attention_mask never; a mask that
    is there is meant.
    """
    ids = needed_ids(row, "input_ids")
    masks: list[list[bool]] = []
    if row.get("labels") is not None:
        labels = as_long(row, "labels", len(ids))
        if any(label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)):
            raise UserError("labels must be input_ids or -100 at each place; do not shift them")
        masks.append([label != IGNORED for label in labels])
    else:
        if row.get("completion_mask") is not None and form.completion_only_loss is not False:
            masks.append(mask_bits(row, "completion_mask", len(ids)))
        if row.get("assistant_masks") is not None:
            masks.append(mask_bits(row, "assistant_masks", len(ids)))
        if form.completion_only_loss and row.get("completion_mask") is None:
            raise UserError("completion_only_loss=True needs completion_mask or labels beside input_ids")
    kept = _unpadded(row, len(ids))
    return {"input_ids": ids[kept], "loss_mask": _all_of(masks, len(ids))[kept]}


def _unpadded(row: Row, length: int) -> slice:
    """The tokens that are no pads, which attention_mask (where there is one) has on the left or on the right."""
    if row.get("attention_mask") is None:
        return slice(length)
    attended = mask_bits(row, "attention_mask", length)
    start = attended.index(True) if any(attended) else length
    stop = start + sum(attended)
    if not all(attended[start:stop]):
        place = attended.index(False, start)
        raise UserError(
            f"attention_mask is 0 at place {place}, within the row, and only pads at its ends can be left out; drop "
            "the token or the column"
        )
    return slice(start, stop)


def _all_of(masks: Sequence[Sequence[bool]], length: int) -> list[bool]:
    return [all(mask[place] for mask in masks) for place in range(length)]


def _from_text(row: Row, tokenizer: PreTrainedTokenizerBase, form: SFTFormat) -> dict[str, list[Any]]:
    if row.get("prompt") is not None or row.get("completion") is not None:
        prompt, completion = needed(row, "prompt"), needed(row, "completion")
        if is_conversation(prompt) and is_conversation(completion):
            return _from_turns(as_messages(prompt), as_messages(completion), row, tokenizer, form)
        if isinstance(prompt, str) and isinstance(completion, str):
            return _from_prompt_and_completion(prompt, completion, tokenizer, form)
        raise UserError("prompt and completion must both be text or both lists of messages")
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            if not is_conversation(row[name]):
                raise UserError(f"{name!r} must be a list of messages with role and content")
            return _from_conversation(as_messages(row[name]), row, tokenizer, form)
    if form.text_field not in row:
        raise UserError(
            f"its columns are {', '.join(map(repr, row))}; SFT needs {form.text_field!r} "
            "(dataset_text_field), 'prompt' and 'completion', 'messages' or 'input_ids'"
        )
    return _from_plain_text(needed(row, form.text_field), tokenizer, form)


def _from_plain_text(text: Any, tokenizer: PreTrainedTokenizerBase, form: SFTFormat) -> dict[str, list[Any]]:
    _refuse_assistant_only(form)
    if not isinstance(text, str):
        raise UserError(f"{form.text_field!r} must be text, not {type(text).__name__}")
    if form.completion_only_loss:
        raise UserError("completion_only_loss=True needs rows with prompt and completion, and this is plain text")
    ids = tokenizer(text=ended(text, tokenizer))["input_ids"]
    return {"input_ids": ids, "loss_mask": [True] * len(ids)}


def _from_prompt_and_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, form: SFTFormat
) -> dict[str, list[Any]]:
    _refuse_assistant_only(form)
    prompt_ids = tokenizer(text=prompt)["input_ids"]
    ids = tokenizer(text=prompt + ended(completion, tokenizer))["input_ids"]
    mask = _completion_mask(prompt_ids, ids, tokenizer)
    return {"input_ids": ids, "loss_mask": [True] * len(ids) if form.completion_only_loss is False else mask}


def _refuse_assistant_only(form: SFTFormat) -> None:
    if form.assistant_only_loss:
        raise UserError("assistant_only_loss=True needs messages, and this row is text; leave it False")


def _completion_mask(prompt_ids: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    return Completed(ids, completion_start(prompt_ids, ids, tokenizer=tokenizer)).mask


def _from_conversation(
    messages: list[dict[str, Any]], row: Row, tokenizer: PreTrainedTokenizerBase, form: SFTFormat
) -> dict[str, list[Any]]:
    if form.completion_only_loss:  # a conversation's completion is its last message
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError(
                f"completion_only_loss=True learns the last of at least 2 messages, and of these {len(messages)} the "
                f"last is of role {messages[-1]['role']!r}; end with one of role 'assistant', or set "
                "assistant_only_loss instead"
            )
        return _from_turns(messages[:-1], messages[-1:], row, tokenizer, form)
    options = template_options(row)
    if not form.assistant_only_loss:
        ids = chat_ids(tokenizer, messages, options=options)
        return {"input_ids": ids, "loss_mask": [True] * len(ids)}
    ids, mask = assistant_tokens(tokenizer, messages, options=options)
    return {"input_ids": ids, "loss_mask": _some_assistant(mask)}


def _from_turns(
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    form: SFTFormat,
) -> dict[str, list[Any]]:
    options = template_options(row)
    masks = []
    if form.assistant_only_loss:
        ids, mask = assistant_tokens(tokenizer, prompt + completion, options=options)
        masks.append(_some_assistant(mask))
    else:
        ids = chat_ids(tokenizer, prompt + completion, options=options)
    if form.completion_only_loss is not False:
        prompt_ids = chat_ids(tokenizer, prompt, add_generation_prompt=True, options=options)
        masks.append(_completion_mask(prompt_ids, ids, tokenizer))
    return {"input_ids": ids, "loss_mask": _all_of(masks, len(ids))}


def _some_assistant(mask: list[bool]) -> list[bool]:
    if not any(mask):
        raise UserError("assistant_only_loss=True finds no token of an assistant; give messages of role 'assistant'")
    return mask
