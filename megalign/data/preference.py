"""Pairs of a chosen and a rejected answer as tokens: for DPO, ORPO and Reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from megalign.data.broken import Skipped, map_rows
from megalign.data.completions import Completed, check_completion, completion_start, prompt_tokens, whole_tokens
from megalign.data.pairs import Tokenizer, check_columns, pair_of, without_empty
from megalign.data.rows import MASK, TOKENS, Row, check_tokens, naming_row, needed, needed_ids
from megalign.data.scored import check_scored, scored_sequence
from megalign.errors import UserError

_SIDES = ("chosen", "rejected")


class Limits(NamedTuple):
    """How long a sequence may be, and what is kept of a longer one."""

    max_length: int | None
    truncation_mode: str = "keep_start"
    max_completion_length: int | None = None

    def cut(self, sides: Sequence[Completed]) -> list[Completed] | None:
        """The sequences within the limits; None when the start is kept and a prompt alone fills it."""
        if self.max_completion_length is not None:
            sides = [side.cut(side.start + self.max_completion_length) for side in sides]
        limit = self.max_length if self.truncation_mode == "keep_start" else None
        if limit is not None and any(side.start >= limit for side in sides):
            return None
        return [side.cut(self.max_length, self.truncation_mode) for side in sides]


def prepare_pairs(
    dataset: Dataset,
    tokenizer: Tokenizer,
    args: Any,
    *,
    vocab_size: int | None = None,
    skipped: Skipped | None = None,
) -> Dataset:
    """DPO's rows: `chosen_ids`, `rejected_ids` (prompt and completion) and `chosen_mask`, `rejected_mask` (completion).

    Tokenized rows have prompt_ids, chosen_ids and rejected_ids. Both sides are cut to max_length by
    truncation_mode; with keep_start, pairs whose prompt alone fills it are dropped and counted. A completion
    without a token to learn of is an error that names the row. Rows that are refused are left out and noted in
    `skipped`, where it is given.
    """
    limits = Limits(args.max_length, args.truncation_mode)
    return _prepared_pairs(dataset, tokenizer, args, _pair_tokens, limits, vocab_size, skipped)


def prepare_orpo_pairs(
    dataset: Dataset,
    tokenizer: Tokenizer,
    args: Any,
    *,
    vocab_size: int | None = None,
    skipped: Skipped | None = None,
) -> Dataset:
    """ORPO's rows, with the columns of `prepare_pairs` and TRL's tokens: a first token (where the tokenizer has one)
    and an end token that is added even behind a template's end of turn.

    Completions are cut to max_completion_length and to what max_length leaves them. Pairs whose prompt alone fills
    max_length are dropped and counted (TRL keeps them, and their loss is 0 / 0).
    """
    limits = Limits(args.max_length, max_completion_length=args.max_completion_length)
    return _prepared_pairs(dataset, tokenizer, args, _orpo_tokens, limits, vocab_size, skipped)


def prepare_reward_pairs(
    dataset: Dataset,
    tokenizer: Tokenizer,
    args: Any,
    *,
    vocab_size: int | None = None,
    pad: int | None = None,
    skipped: Skipped | None = None,
) -> Dataset:
    """Reward's rows: `chosen_ids` and `rejected_ids`, whole texts, and `margin` where the dataset has one.

    Tokenized rows have chosen_ids and rejected_ids. Pairs of which one is longer than max_length are dropped and
    counted, as in TRL. `pad` as in `sequences_of_reward_pair`.
    """
    check_columns(dataset, ("chosen_ids", "rejected_ids"), tokenizer)
    margin = {"margin": Value("float64")} if "margin" in dataset.column_names else {}
    rows = map_rows(
        dataset,
        reward_row,
        features={"chosen_ids": TOKENS, "rejected_ids": TOKENS, **margin},
        options={"tokenizer": tokenizer, "max_length": args.max_length, "vocab_size": vocab_size, "pad": pad},
        skipped=skipped,
        num_proc=args.dataset_num_proc,
        desc="Tokenizing pairs",
    )
    return without_empty(rows, "chosen_ids", args.max_length)


def _prepared_pairs(
    dataset: Dataset,
    tokenizer: Tokenizer,
    args: Any,
    encode: Callable[[Row, PreTrainedTokenizerBase], list[Completed]],
    limits: Limits,
    vocab_size: int | None,
    skipped: Skipped | None,
) -> Dataset:
    check_columns(dataset, ("prompt_ids", "chosen_ids", "rejected_ids"), tokenizer)
    rows = map_rows(
        dataset,
        pair_row,
        features={"chosen_ids": TOKENS, "rejected_ids": TOKENS, "chosen_mask": MASK, "rejected_mask": MASK},
        options={"tokenizer": tokenizer, "encode": encode, "limits": limits, "vocab_size": vocab_size},
        skipped=skipped,
        num_proc=args.dataset_num_proc,
        desc="Tokenizing pairs",
    )
    return without_empty(rows, "chosen_ids", args.max_length)


# ---- DPO and ORPO


def pair_row(
    row: Row,
    index: int,
    *,
    tokenizer: Tokenizer,
    encode: Callable[[Row, PreTrainedTokenizerBase], list[Completed]],
    limits: Limits,
    vocab_size: int | None,
) -> dict[str, list[Any]]:
    """One row -> both sides' ids and masks, empty when the limits leave no completion."""
    with naming_row(index):
        if "chosen_ids" in row:
            prompt = needed_ids(row, "prompt_ids")
            sides = [Completed(prompt + needed_ids(row, f"{side}_ids"), len(prompt)) for side in _SIDES]
        else:
            assert tokenizer is not None, "checked for the dataset"
            sides = encode(row, tokenizer)
        for side in sides:
            check_tokens(side.ids, vocab_size)
        kept = limits.cut(sides)
        for side, name in zip(kept or [], _SIDES, strict=False):
            check_completion(side, name)
    found: dict[str, list[Any]] = {}
    for side, name in zip(kept or [Completed([], 0)] * 2, _SIDES, strict=True):
        found |= {f"{name}_ids": side.ids, f"{name}_mask": side.mask}
    return found


def _pair_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Completed]:
    """Both completions begin where the first of them leaves the prompt."""
    pair = pair_of(row).ended(tokenizer)
    prompt = prompt_tokens(pair.prompt, row, tokenizer)
    wholes = [whole_tokens(pair.prompt, answer, row, tokenizer) for answer in (pair.chosen, pair.rejected)]
    start = completion_start(prompt, *wholes, tokenizer=tokenizer)
    return [Completed(ids, start) for ids in wholes]


def _orpo_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Completed]:
    """Each completion begins where it leaves the prompt itself; `_bounded` adds what the tokenizer may not."""
    pair = pair_of(row)
    prompt = prompt_tokens(pair.prompt, row, tokenizer, add_special_tokens=False)
    sides = []
    for answer in (pair.chosen, pair.rejected):
        ids = whole_tokens(pair.prompt, answer, row, tokenizer, add_special_tokens=False)
        sides.append(_bounded(Completed(ids, completion_start(prompt, ids, tokenizer=tokenizer)), tokenizer))
    return sides


def _bounded(side: Completed, tokenizer: PreTrainedTokenizerBase) -> Completed:
    """With the tokenizer's first token before it and its end token behind it, unless they are there."""
    if tokenizer.eos_token_id is None:
        raise UserError("completions end with the tokenizer's end token and it has none; eos_token names one")
    ids, start, bos = side.ids, side.start, tokenizer.bos_token_id
    if start == len(ids) or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    if bos is not None and (start == 0 or ids[0] != bos):
        ids, start = [bos, *ids], start + 1
    return Completed(ids, start)


def sequences_of_pair(row: Row) -> list[dict[str, Any]]:
    """A row of `prepare_pairs` -> chosen and rejected as `collate.pack` takes them.

    List columns ref_chosen_logprobs and ref_rejected_logprobs become the token column ref_logprobs.
    """
    sequences = [{"tokens": row[f"{side}_ids"], "loss_mask": row[f"{side}_mask"]} for side in _SIDES]
    for sequence, side in zip(sequences, _SIDES, strict=True):
        if f"ref_{side}_logprobs" in row:
            sequence["ref_logprobs"] = row[f"ref_{side}_logprobs"]
    return sequences


def sequences_of_orpo_pair(row: Row) -> list[dict[str, Any]]:
    """A row of `prepare_orpo_pairs` -> chosen, all of whose tokens are in the loss, and rejected, whose completion is.

    Token column completion_mask is 1 on the completion's tokens that are predicted (never a sequence's first).
    """
    sequences = []
    for side in _SIDES:
        completion = [False, *row[f"{side}_mask"][1:]]
        sequences.append(
            {
                "tokens": row[f"{side}_ids"],
                "loss_mask": [True] * len(completion) if side == "chosen" else completion,
                "completion_mask": [float(bit) for bit in completion],
            }
        )
    return sequences


# ---- Reward


def reward_row(
    row: Row,
    index: int,
    *,
    tokenizer: Tokenizer,
    max_length: int | None,
    vocab_size: int | None,
    pad: int | None = None,
) -> dict[str, Any]:
    """One row -> the ids of both whole texts, empty when one is longer than max_length, and its margin if any."""
    with naming_row(index):
        pair = _whole_texts(row, tokenizer)
        for ids, name in zip(pair, _SIDES, strict=True):
            check_tokens(ids, vocab_size)
            check_scored(ids, pad, f"its {name}")
        margin = {"margin": _margin(row)} if "margin" in row else {}
    if max_length is not None and max(map(len, pair)) > max_length:
        pair = [[], []]
    return {"chosen_ids": pair[0], "rejected_ids": pair[1], **margin}


def _whole_texts(row: Row, tokenizer: Tokenizer) -> list[list[int]]:
    if "chosen_ids" in row:
        if row.get("prompt_ids") is not None:
            raise UserError(
                "it has prompt_ids beside chosen_ids, and Reward's chosen_ids are whole texts; put the prompt into "
                "chosen_ids and rejected_ids and remove the column"
            )
        return [needed_ids(row, f"{side}_ids") for side in _SIDES]
    assert tokenizer is not None, "checked for the dataset"
    pair = pair_of(row).ended(tokenizer)
    return [whole_tokens(pair.prompt, answer, row, tokenizer) for answer in (pair.chosen, pair.rejected)]


def _margin(row: Row) -> float:
    margin = needed(row, "margin")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"its margin={margin!r} must be a finite number; mend it or drop the row")
    return float(margin)


def sequences_of_reward_pair(row: Row, pad: int | None = None) -> list[dict[str, Any]]:
    """A row of `prepare_reward_pairs` -> chosen and rejected, whose last token that is not `pad` alone is in the loss;
    both have the row's margin.
    """
    margin = {"margin": row["margin"]} if "margin" in row else {}
    return [{**scored_sequence(row[f"{side}_ids"], pad), **margin} for side in _SIDES]
