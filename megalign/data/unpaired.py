"""Single answers with a verdict, good or bad, as tokens, and the mismatched ones of KTO's z; pairs are taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from megalign.data.broken import Skipped, map_rows
from megalign.data.chat import as_messages, is_conversation
from megalign.data.completions import (
    Completed,
    Words,
    check_completion,
    completion_start,
    ended,
    prompt_tokens,
    whole_tokens,
)
from megalign.data.pairs import Tokenizer, check_columns, pair_of, without_empty
from megalign.data.rows import MASK, ROW_NUMBER, TOKENS, Row, check_tokens, naming_row, needed, needed_ids
from megalign.errors import UserError

ROWS_AT_A_TIME = 1000
"""Pairs that are taken apart together, all chosen before all rejected: datasets' batch size in map, hence TRL's."""

_ANSWERS = {"prompt_ids": TOKENS, "completion_ids": TOKENS, "desirable": Value("bool")}
_NUMBER = {ROW_NUMBER: Value("int64")}
_SEQUENCES = {"input_ids": TOKENS, "loss_mask": MASK}


def prepare_unpaired(
    dataset: Dataset,
    tokenizer: Tokenizer,
    args: Any,
    *,
    block: int | None = None,
    shuffle_seed: int | None = None,
    vocab_size: int | None = None,
    skipped: Skipped | None = None,
) -> Dataset:
    """KTO's rows: `input_ids`, `loss_mask` (the completion) and `desirable`; with `block` also `kl_ids`, `kl_mask`.

    Rows have prompt, completion and label, or the columns of preferences, or prompt_ids, completion_ids and label.
    Sequences keep their first max_length tokens; rows whose prompt alone fills it are dropped and counted. The
    mismatched sequence of a row is its prompt with the completion of the row before it, within every `block` of
    rows, in which the first takes the last one's (arXiv 2402.01306 sec. 4.1): give the rows of a step. With
    `shuffle_seed` the rows are shuffled before they are put into blocks. A row alone in the last block takes the
    completion of the row before it, in the block before; in TRL it keeps its own, which is no mismatch. Rows
    that are refused are left out and noted in `skipped`, where it is given.
    """
    check_columns(dataset, ("prompt_ids", "completion_ids"), tokenizer)
    answers = map_rows(
        dataset,
        answers_of_row,
        features={name: List(kind) for name, kind in _ANSWERS.items()},
        options={"tokenizer": tokenizer, "max_length": args.max_length, "vocab_size": vocab_size},
        skipped=skipped,
        num_proc=args.dataset_num_proc,
        desc="Tokenizing answers",
    )
    single = answers.map(
        _one_by_one,
        batched=True,
        batch_size=ROWS_AT_A_TIME,
        features=Features(_ANSWERS | _NUMBER),
        desc="Taking pairs apart",
    )
    kept = without_empty(single, "completion_ids", args.max_length)
    if shuffle_seed is not None:
        kept = kept.shuffle(seed=shuffle_seed)
    mismatched = {"kl_ids": TOKENS, "kl_mask": MASK} if block else {}
    is_last_alone = block is not None and block > 1 and len(kept) > 1 and len(kept) % block == 1
    return kept.map(
        _sequences,
        batched=True,
        batch_size=block or ROWS_AT_A_TIME,
        fn_kwargs={
            "max_length": args.max_length,
            "mismatched": bool(block),
            "for_one_alone": kept[len(kept) - 2]["completion_ids"] if is_last_alone else None,
        },
        remove_columns=["prompt_ids", "completion_ids"],
        features=Features({"desirable": Value("bool"), **_NUMBER, **_SEQUENCES, **mismatched}),
        desc="Joining prompts and completions",
    )


def answers_of_row(
    row: Row, index: int, *, tokenizer: Tokenizer, max_length: int | None, vocab_size: int | None
) -> dict[str, list[Any]]:
    """One row -> the prompt, completion and verdict of its answer or, for a pair, of both, chosen first.

    Both are empty where the prompt alone fills max_length.
    """
    found: dict[str, list[Any]] = {name: [] for name in _ANSWERS}
    with naming_row(index):
        for completed, desirable in _answers(row, tokenizer):
            check_tokens(completed.ids, vocab_size)
            fits = max_length is None or completed.start < max_length
            if fits:
                check_completion(completed, "completion")
            found["prompt_ids"].append(completed.ids[: completed.start] if fits else [])
            found["completion_ids"].append(completed.ids[completed.start :] if fits else [])
            found["desirable"].append(desirable)
    return found


def _answers(row: Row, tokenizer: Tokenizer) -> list[tuple[Completed, bool]]:
    if "completion_ids" in row:
        prompt = needed_ids(row, "prompt_ids")
        return [(Completed(prompt + needed_ids(row, "completion_ids"), len(prompt)), _label(row))]
    assert tokenizer is not None, "checked for the dataset"
    if "chosen" in row and "rejected" in row:
        pair = pair_of(row)
        return [
            (_completed(pair.prompt, pair.chosen, row, tokenizer), True),
            (_completed(pair.prompt, pair.rejected, row, tokenizer), False),
        ]
    prompt, completion = needed(row, "prompt"), needed(row, "completion")
    if is_conversation(prompt) and is_conversation(completion):
        return [(_completed(as_messages(prompt), as_messages(completion), row, tokenizer), _label(row))]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [(_completed(prompt, completion, row, tokenizer), _label(row))]
    raise UserError("prompt and completion must both be text or both lists of at least one message")


def _label(row: Row) -> bool:
    label = needed(row, "label")
    if label not in (True, False):  # 1 and 0 are equal to them
        raise UserError(f"its label={label!r} must be True (a good answer) or False; mend it")
    return bool(label)


def _completed(prompt: Words, completion: Words, row: Row, tokenizer: PreTrainedTokenizerBase) -> Completed:
    if isinstance(completion, str):
        completion = ended(completion, tokenizer)
    ids = whole_tokens(prompt, completion, row, tokenizer)
    return Completed(ids, completion_start(prompt_tokens(prompt, row, tokenizer), ids, tokenizer=tokenizer))


def _one_by_one(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The first answers of all rows, then the second, each with its row's number."""
    counts = [len(answers) for answers in rows["desirable"]]
    columns = {name: rows[name] for name in _ANSWERS}
    columns[ROW_NUMBER] = [[number] * count for number, count in zip(rows[ROW_NUMBER], counts, strict=True)]
    return {
        name: [answers[place] for place in range(2) for answers in column if len(answers) > place]
        for name, column in columns.items()
    }


def _sequences(
    rows: Mapping[str, Sequence[Any]], *, max_length: int | None, mismatched: bool, for_one_alone: list[int] | None
) -> dict[str, list[list[Any]]]:
    prompts, completions = rows["prompt_ids"], rows["completion_ids"]
    found = dict(zip(("input_ids", "loss_mask"), _joined(prompts, completions, max_length), strict=True))
    if mismatched:
        is_alone = len(completions) == 1 and for_one_alone is not None
        before = [for_one_alone] if is_alone else [completions[-1], *completions[:-1]]
        found |= zip(("kl_ids", "kl_mask"), _joined(prompts, before, max_length), strict=True)
    return found


def _joined(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], max_length: int | None
) -> tuple[list[list[int]], list[list[bool]]]:
    joined = [
        Completed(prompt + completion, len(prompt)).cut(max_length)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return [each.ids for each in joined], [each.mask for each in joined]


# ---- sequences


def sequence_of_unpaired(row: Row) -> dict[str, Any]:
    """A row of `prepare_unpaired` -> its sequence as `collate.pack` takes it, with the column `desirable` (1 or 0).

    A list column ref_logprobs becomes the token column of that name.
    """
    reference = {"ref_logprobs": row["ref_logprobs"]} if "ref_logprobs" in row else {}
    return {
        "tokens": row["input_ids"],
        "loss_mask": row["loss_mask"],
        "desirable": float(row["desirable"]),
        **reference,
    }


def kl_sequence(row: Row) -> dict[str, Any]:
    """A row of `prepare_unpaired` -> its mismatched sequence, of which z is estimated.

    A list column ref_kl_logprobs becomes the token column ref_logprobs.
    """
    reference = {"ref_logprobs": row["ref_kl_logprobs"]} if "ref_kl_logprobs" in row else {}
    return {"tokens": row["kl_ids"], "loss_mask": row["kl_mask"], **reference}
