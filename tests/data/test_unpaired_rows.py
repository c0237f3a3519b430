"""Tokens, masks and mismatched sequences of single answers against TRL 1.16's own preparation of the same rows."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from trl.data_utils import unpair_preference_dataset

from megalign.config import KTOConfig
from megalign.data.collate import pack
from megalign.data.rows import ROW_NUMBER, without_numbers
from megalign.data.unpaired import kl_sequence, prepare_unpaired, sequence_of_unpaired
from megalign.errors import UserError
from tests.data.preference_rows import AIR, BLUE, GREEN, PAIRS, SYSTEM, USER, WHY, Rows, trl_unpaired
from tests.data.tokenizers_made_here import TEMPLATES, make_tokenizer, unmarked

CHATML = unmarked(TEMPLATES["chatml"])
SINGLE: dict[str, Rows] = {
    "text": [
        {"prompt": "What color is the sky? ", "completion": "It is blue.", "label": True},
        {"prompt": "1 + 2 =", "completion": " 3<|endoftext|>", "label": True},
        {"prompt": "one", "completion": "", "label": False},
        {"prompt": "The quick brown fox", "completion": " jumps over the lazy dog.", "label": True},
        {"prompt": "five", "completion": " six", "label": False},
    ],
    "messages": [
        {"prompt": [USER], "completion": [BLUE], "label": True},
        {"prompt": [SYSTEM, USER, BLUE, WHY], "completion": [AIR], "label": False},
        {"prompt": [USER], "completion": [GREEN, WHY, AIR], "label": False},
    ],
}
ROWS = SINGLE | {f"pairs of {form}": rows for form, rows in PAIRS.items()}
TOKENIZED = [
    {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9], "label": True},
    {"prompt_ids": [5], "completion_ids": [10, 11, 12], "label": False},
    {"prompt_ids": [6, 7], "completion_ids": [13], "label": False},
]


def ours(rows: Rows, template: str | None = CHATML, *, block: int | None = None, **fields: Any) -> Rows:
    args = KTOConfig(**fields)
    return list(without_numbers(prepare_unpaired(Dataset.from_list(rows), make_tokenizer(template), args, block=block)))


def but_one_alone(rows: Rows, block: int) -> Rows:
    """The rows; one alone in the last block without its mismatched sequence, for which TRL takes its own answer."""
    if len(rows) % block != 1:
        return rows
    return [*rows[:-1], {name: rows[-1][name] for name in ("desirable", "input_ids", "loss_mask")}]


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("form", ROWS)
def test_rows_of_every_format_are_trls(form: str, template: str) -> None:
    text = unmarked(TEMPLATES[template])
    args = KTOConfig(per_device_train_batch_size=2)
    rows = ours(ROWS[form], text, block=2)
    assert but_one_alone(rows, 2) == but_one_alone(trl_unpaired(ROWS[form], make_tokenizer(text), args), 2)
    assert len(rows) == len(ROWS[form]) * (2 if "pairs" in form else 1)
    assert {row["desirable"] for row in rows} == {True, False}


@pytest.mark.parametrize("block", [2, 3, 8])
@pytest.mark.parametrize("length", [4, 7, 9])
def test_rows_are_cut_dropped_and_mismatched_as_trl_does(length: int, block: int) -> None:
    args = KTOConfig(max_length=length, per_device_train_batch_size=block)
    rows = ours(SINGLE["text"], max_length=length, block=block)
    theirs = trl_unpaired(SINGLE["text"], make_tokenizer(), args)
    assert but_one_alone(rows, block) == but_one_alone(theirs, block)
    assert max(len(row["kl_ids"]) for row in rows) <= length
    assert len(rows) == {4: 2, 7: 4, 9: 5}[length]


def test_pairs_are_taken_apart_a_thousand_at_a_time_as_trl_does() -> None:
    pairs = Dataset.from_list([{"prompt": f"{n} =", "chosen": f" {n}", "rejected": " two"} for n in range(1002)])
    args = KTOConfig()
    found = prepare_unpaired(pairs, make_tokenizer(), args)
    assert found["desirable"] == [True] * 1000 + [False] * 1000 + [True, True, False, False]
    assert found[ROW_NUMBER] == [*range(1000)] * 2 + [1000, 1001] * 2
    theirs = prepare_unpaired(unpair_preference_dataset(pairs), make_tokenizer(), args)
    assert list(without_numbers(found)) == list(without_numbers(theirs))


def test_processes_do_not_change_the_order() -> None:
    rows = PAIRS["text"]
    assert ours(rows, dataset_num_proc=2) == ours(rows)


def test_mismatched_sequences_rotate_within_each_block() -> None:
    rows = list(prepare_unpaired(Dataset.from_list(TOKENIZED), None, KTOConfig(max_length=5), block=2))
    assert [row["input_ids"] for row in rows] == [[5, 6, 7, 8, 9], [5, 10, 11, 12], [6, 7, 13]]
    assert [row["kl_ids"] for row in rows] == [[5, 6, 7, 10, 11], [5, 8, 9], [6, 7, 10, 11, 12]]
    assert [row["kl_mask"] for row in rows] == [[False] * 3 + [True] * 2, [False, True, True], [False] * 2 + [True] * 3]
    assert [row["desirable"] for row in rows] == [True, False, False]
    without = prepare_unpaired(Dataset.from_list(TOKENIZED), None, KTOConfig(max_length=5))
    assert set(without.column_names) == {"input_ids", "loss_mask", "desirable", ROW_NUMBER}


def test_shuffled_rows_borrow_answers_within_their_new_blocks() -> None:
    rows = [{"prompt_ids": [5, n], "completion_ids": [n], "label": n % 2 == 0} for n in range(10, 22)]
    options = {"block": 4, "shuffle_seed": 3}
    found = list(prepare_unpaired(Dataset.from_list(rows), None, KTOConfig(), **options))
    order = [row["input_ids"][-1] for row in found]
    assert [10 + row[ROW_NUMBER] for row in found] == order
    assert sorted(order) == list(range(10, 22)) != order
    for start in range(0, 12, 4):
        block = order[start : start + 4]
        assert [row["kl_ids"][-1] for row in found[start : start + 4]] == [block[-1], *block[:-1]]


def test_a_rows_sequences_take_its_reference_logprobs_along() -> None:
    row = {
        "input_ids": [5, 6, 7],
        "loss_mask": [False, True, True],
        "desirable": True,
        "kl_ids": [5, 8],
        "kl_mask": [False, True],
    }
    assert sequence_of_unpaired(row) == {"tokens": [5, 6, 7], "loss_mask": [False, True, True], "desirable": 1.0}
    assert kl_sequence(row) == {"tokens": [5, 8], "loss_mask": [False, True]}
    row |= {"ref_logprobs": [0.0, -1.0, -2.0], "ref_kl_logprobs": [0.0, -3.0], "desirable": False}
    batch = pack([sequence_of_unpaired(row), sequence_of_unpaired({**row, "desirable": True})])
    assert batch["desirable"].tolist() == [0, 1] and batch["ref_logprobs"].tolist() == [0, -1, -2] * 2
    batch = pack([kl_sequence(row)])
    assert batch["ref_logprobs"].tolist() == [0, -3] and batch["loss_mask"].tolist() == [False, True]


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_a_row_alone_in_the_last_block_takes_the_answer_of_the_row_before_it(shuffle_seed: int | None) -> None:
    rows = [{"prompt_ids": [5, n], "completion_ids": [n, n], "label": n % 2 == 0} for n in range(10, 19)]
    options = {"block": 4, "shuffle_seed": shuffle_seed}
    *_, before, alone = prepare_unpaired(Dataset.from_list(rows), None, KTOConfig(), **options)
    assert alone["kl_ids"] == alone["input_ids"][:2] + before["input_ids"][2:] != alone["input_ids"]
    assert alone["kl_mask"] == [False, False, True, True]
    (only,) = prepare_unpaired(Dataset.from_list(rows[:1]), None, KTOConfig(), **options)
    assert only["kl_ids"] == only["input_ids"]  # there is no other answer


GOOD = SINGLE["text"][0]
BAD_ROWS: dict[str, tuple[Rows, dict[str, Any], str]] = {
    "no label": ([GOOD, {**GOOD, "label": None}], {}, "row 1: it has no 'label'"),
    "label of text": ([{**GOOD, "label": "yes"}], {}, "row 0: its label='yes' must be True .* or False"),
    "label of five stars": ([{**GOOD, "label": 5}], {}, "row 0: its label=5"),
    "no prompt": ([{"completion": "a", "label": True}], {}, "row 0: it has no 'prompt'"),
    "text and messages": ([{**GOOD, "completion": [BLUE]}], {}, "row 0: .*both be text or both lists"),
    "no message": (
        [{"prompt": [USER], "completion": [BLUE], "label": True}, {**GOOD, "prompt": [], "completion": [BLUE]}],
        {},
        "row 1: .*at least one message",
    ),
    "nothing": ([{"prompt": "", "completion": "", "label": True}], {}, "row 0: its completion has no token to learn"),
    "an empty completion": (
        [TOKENIZED[0], {**TOKENIZED[0], "completion_ids": []}],
        {},
        "row 1: its completion has no token to learn of",
    ),
    "nothing of a pair": ([{"prompt": "", "chosen": "one two", "rejected": ""}], {}, "row 0: its completion has no"),
    "ids of fractions": ([TOKENIZED[0], {**TOKENIZED[0], "completion_ids": [8.0, 9.5]}], {}, "row 0: .* 8.0 at place"),
    "no room": ([GOOD], {"max_length": 3}, "all 1 rows are too long for max_length=3"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_its_number(case: str) -> None:
    rows, fields, message = BAD_ROWS[case]
    with pytest.raises(UserError, match=message) as caught:
        ours(rows, **fields)
    assert "\n" not in str(caught.value)


def test_labels_of_one_and_nought_are_verdicts() -> None:
    rows = [{**GOOD, "label": 1}, {**GOOD, "label": 0}]
    assert [row["desirable"] for row in ours(rows)] == [True, False]


def test_a_token_that_the_model_has_not_is_named() -> None:
    with pytest.raises(UserError, match="row 1: token id 12 at place 3"):
        prepare_unpaired(Dataset.from_list(TOKENIZED), None, KTOConfig(), vocab_size=12)
