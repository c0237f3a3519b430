"""What a row of preferences says: prompt, chosen and rejected, in every format of TRL's; and its dataset's mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from megalign.data.chat import as_messages, common_prefix_length, is_conversation
from megalign.data.completions import Words, ended
from megalign.data.rows import Row, needed
from megalign.errors import UserError

logger = logging.get_logger(__name__)

Tokenizer = PreTrainedTokenizerBase | None  # tokenized rows need none


class Pair(NamedTuple):
    """A row of preferences: all text or all messages."""

    prompt: Words
    chosen: Words
    rejected: Words

    def ended(self, tokenizer: PreTrainedTokenizerBase) -> Pair:
        """With the end token behind text; messages are ended by the chat template."""
        if isinstance(self.prompt, list):
            return self
        return self._replace(chosen=ended(self.chosen, tokenizer), rejected=ended(self.rejected, tokenizer))


def pair_of(row: Row) -> Pair:
    """The row's prompt, chosen and rejected.

    Without a prompt (or with one in text beside messages, which repeats them) it is what chosen and rejected
    begin with in common.
    """
    chosen, rejected = needed(row, "chosen"), needed(row, "rejected")
    if chosen == rejected:
        logger.warning_once("a pair's chosen and rejected are the same and teach no preference (shown once)")
    prompt = row.get("prompt")
    if is_conversation(chosen) and is_conversation(rejected):
        if prompt is None or isinstance(prompt, str):
            pair = _with_shared_prompt(as_messages(chosen), as_messages(rejected))
            if prompt is not None and not pair.prompt:
                raise UserError("its prompt is text and the messages do not hold it; make it a list of messages")
            return pair
        if is_conversation(prompt):
            return Pair(as_messages(prompt), as_messages(chosen), as_messages(rejected))
    elif isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _with_shared_prompt(chosen, rejected)
        if isinstance(prompt, str):
            return Pair(prompt, chosen, rejected)
    raise UserError("prompt, chosen and rejected must all be text or all be lists of at least one message")


def _with_shared_prompt(chosen: Words, rejected: Words) -> Pair:
    """TRL's rule: the prompt ends before the first difference and before the last element of either; a text's last
    space belongs to the completions.
    """
    start = common_prefix_length(chosen, rejected)
    if start == min(len(chosen), len(rejected)):
        start = max(start - 1, 0)
    elif start > 0 and chosen[start - 1] == " ":  # TRL asks at 0 as well, and takes the text's last character
        start -= 1
    return Pair(chosen[:start], chosen[start:], rejected[start:])


def check_columns(dataset: Dataset, tokens: Sequence[str], tokenizer: Tokenizer) -> None:
    """UserError for the names of old TRL versions, and for text without a tokenizer."""
    old = [name for name in ("chosen_input_ids", "rejected_input_ids") if name in dataset.column_names]
    if old:
        raise UserError(f"column {old[0]!r} is now {old[0].replace('_input', '')!r}; dataset.rename_column does it")
    if tokenizer is None and any(name not in dataset.column_names for name in tokens):
        raise UserError(
            f"rows without {' and '.join(tokens)} need a tokenizer and the model has none; give tokenized rows"
        )


def without_empty(rows: Dataset, column: str, max_length: int | None) -> Dataset:
    """The rows without those that were emptied for their length, which are counted; none left is an error."""
    kept = rows.filter(bool, input_columns=column, desc="Dropping rows that are too long")
    if len(kept) == 0 and len(rows) > 0:
        raise UserError(f"all {len(rows)} rows are too long for max_length={max_length}; raise it")
    if len(kept) < len(rows):
        logger.warning(
            "%d of %d rows do not fit into max_length=%s and are dropped", len(rows) - len(kept), len(rows), max_length
        )
    return kept
