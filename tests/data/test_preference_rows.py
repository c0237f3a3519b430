"""Tokens and masks of pairs in every format against TRL 1.16's own preparation of the same rows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from trl.data_utils import extract_prompt

from megalign.config import DPOConfig, ORPOConfig, RewardConfig
from megalign.data.collate import pack
from megalign.data.pairs import pair_of
from megalign.data.preference import (
    prepare_orpo_pairs,
    prepare_pairs,
    prepare_reward_pairs,
    sequences_of_orpo_pair,
    sequences_of_pair,
    sequences_of_reward_pair,
)
from megalign.data.rows import ROW_NUMBER, without_numbers
from megalign.errors import UserError
from tests.data.preference_rows import (
    AIR,
    BLUE,
    CONVERSATIONAL,
    FOX,
    GREEN,
    PAIRS,
    SYSTEM,
    USER,
    WHY,
    Rows,
    collated_pairs,
    trl_orpo_pairs,
    trl_pairs,
    trl_reward_pairs,
)
from tests.data.tokenizers_made_here import TEMPLATES, make_tokenizer, marked, unmarked
from tests.fuzzing import fuzzing

CHATML = unmarked(TEMPLATES["chatml"])
PREPARE = {"dpo": prepare_pairs, "orpo": prepare_orpo_pairs, "reward": prepare_reward_pairs}
CONFIGS = {"dpo": DPOConfig, "orpo": ORPOConfig, "reward": RewardConfig}
TRL = {"dpo": trl_pairs, "orpo": trl_orpo_pairs, "reward": trl_reward_pairs}
TOKENIZED = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]},
    {"prompt_ids": [], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [12, 13]},
]


def ours(kind: str, rows: Rows, template: str | None = CHATML, **fields: Any) -> Rows:
    prepared = PREPARE[kind](Dataset.from_list(rows), make_tokenizer(template), CONFIGS[kind](**fields))
    return list(without_numbers(prepared))


def theirs(kind: str, rows: Rows, template: str = CHATML, **fields: Any) -> Rows:
    return TRL[kind](rows, make_tokenizer(template), CONFIGS[kind](**fields))


# ---- the prompt within


@pytest.mark.parametrize("form", [form for form in PAIRS if "inside" in form])
def test_the_shared_prompt_is_trls(form: str) -> None:
    for row in PAIRS[form]:
        expected = extract_prompt(row)
        assert pair_of(row)._asdict() == expected
        assert expected["chosen"] and expected["rejected"]


@fuzzing(100)
@given(st.text("ab ", min_size=1, max_size=6), st.text("ab ", min_size=1, max_size=6))
def test_the_shared_prompt_of_any_two_texts_is_trls(chosen: str, rejected: str) -> None:
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    if chosen[0] != rejected[0] and chosen[-1] == " ":
        # TRL looks at the character before the first, which in Python is the last, and takes all before it
        assert expected["prompt"] == chosen[:-1]
        expected = {"prompt": "", "chosen": chosen, "rejected": rejected}
    assert pair_of({"chosen": chosen, "rejected": rejected})._asdict() == expected


def test_one_answer_that_begins_the_other_keeps_its_last_element() -> None:
    pair = pair_of({"chosen": [USER, BLUE, WHY], "rejected": [USER, BLUE]})
    assert pair == ([USER], [BLUE, WHY], [BLUE])
    assert pair_of({"chosen": "one", "rejected": "one"}) == ("on", "e", "e")


def test_a_prompt_in_text_beside_messages_gives_way_to_theirs() -> None:
    row = {"prompt": USER["content"], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}
    assert pair_of(row) == ([USER], [BLUE], [GREEN])
    with pytest.raises(UserError, match="its prompt is text and the messages do not hold it"):
        pair_of({**row, "chosen": [BLUE], "rejected": [GREEN]})


# ---- tokens and masks


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize("kind", ["dpo", "orpo", "reward"])
def test_rows_of_every_format_are_trls(kind: str, form: str, template: str) -> None:
    text = unmarked(TEMPLATES[template])
    rows = ours(kind, PAIRS[form], text)
    assert rows == theirs(kind, PAIRS[form], text)
    assert len(rows) == len(PAIRS[form])
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in rows)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "reward"])
def test_a_prompt_that_melts_into_one_answer_only_is_split_as_trl_does(kind: str) -> None:
    rows = [{"prompt": "What color is the sky? ", "chosen": "It is blue.", "rejected": "! one two"}]
    assert ours(kind, rows) == theirs(kind, rows)
    prompt, it = (make_tokenizer()(text)["input_ids"] for text in ("What color is the sky? ", "? It"))
    assert it[-1] not in prompt and len(it) == 2  # the last space is part of another token


@pytest.mark.parametrize("kind", ["dpo", "orpo", "reward"])
def test_what_a_tokenizer_adds_by_itself_is_as_in_trl(kind: str) -> None:
    tokenizer = make_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin_of_text|>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A </s>", special_tokens=special
    )
    rows = list(without_numbers(PREPARE[kind](Dataset.from_list(PAIRS["text"]), tokenizer, CONFIGS[kind]())))
    assert rows == TRL[kind](PAIRS["text"], tokenizer, CONFIGS[kind]())
    assert all(row["chosen_ids"][0] == special[0][1] for row in rows)
    assert all((row["chosen_ids"][-1] == special[1][1]) == (kind != "orpo") for row in rows)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("length", [4, 9, 14])
@pytest.mark.parametrize("form", ["text", "text with the prompt inside"])
def test_pairs_are_cut_and_overlong_prompts_dropped_as_trl_does(form: str, length: int, mode: str) -> None:
    fields = {"max_length": length, "truncation_mode": mode}
    rows = ours("dpo", PAIRS[form], **fields)
    assert rows == theirs("dpo", PAIRS[form], **fields)
    assert max(len(row["chosen_ids"]) for row in rows) <= length
    assert all(any(row["chosen_mask"]) and any(row["rejected_mask"]) for row in rows)


def test_overlong_prompts_are_there_to_be_dropped() -> None:
    longest = ours("orpo", PAIRS["text"], max_completion_length=2)
    assert max(sum(mask) for row in longest for mask in (row["chosen_mask"], row["rejected_mask"])) == 2
    kept = [len(ours("dpo", PAIRS["text"], max_length=4, truncation_mode=mode)) for mode in ("keep_start", "keep_end")]
    assert kept == [1, 3]


@pytest.mark.parametrize("length", [7, 14])
def test_orpos_completions_are_cut_as_trls_and_never_to_nothing(length: int) -> None:
    rows = ours("orpo", PAIRS["text"], max_length=length)
    expected = theirs("orpo", PAIRS["text"], max_length=length)
    whole = [row for row in expected if any(row["chosen_mask"]) and any(row["rejected_mask"])]
    assert rows == whole
    assert (len(whole) < len(expected)) == (length == 7)  # TRL keeps pairs without a completion


@pytest.mark.parametrize("length", [8, 9])
def test_reward_drops_pairs_that_are_too_long_as_trl_does(length: int) -> None:
    rows = [{**row, "margin": place / 2} for place, row in enumerate(PAIRS["text"])]
    kept = ours("reward", rows, max_length=length)
    assert kept == theirs("reward", rows, max_length=length)
    assert len(kept) == {8: 1, 9: 2}[length]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_tools_and_template_arguments_of_a_row_reach_the_template_as_trls(kind: str) -> None:
    template = "{{ (tools[0]['name'] if tools else 'none') + greeting }}" + CHATML
    rows = [
        {**PAIRS["messages"][0], "tools": '[{"name": "add"}]', "chat_template_kwargs": {"greeting": " Hi "}},
        {**PAIRS["messages"][1], "tools": "[]", "chat_template_kwargs": {"greeting": " Why "}},
    ]
    found = ours(kind, rows, template)
    # TRL hands an empty list on, which this template takes for none
    assert found == theirs(kind, rows, template)
    decoded = [make_tokenizer().decode(row["rejected_ids"]) for row in found]
    assert decoded[0].startswith("add Hi <|im_start|>") and decoded[1].startswith("none Why <|im_start|>")


@pytest.mark.parametrize("form", CONVERSATIONAL)
def test_masks_need_no_generation_marks(form: str) -> None:
    assert ours("dpo", PAIRS[form]) == ours("dpo", PAIRS[form], marked(TEMPLATES["chatml"]))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("length", [None, 4, 3, 2])
def test_tokenized_pairs_are_cut_as_trls_collator_does(length: int | None, mode: str) -> None:
    args = DPOConfig(max_length=length, truncation_mode=mode)
    fits = [row for row in TOKENIZED if mode == "keep_end" or length is None or len(row["prompt_ids"]) < length]
    rows = prepare_pairs(Dataset.from_list(TOKENIZED), None, args)
    assert list(without_numbers(rows)) == collated_pairs(fits, args)
    assert [TOKENIZED[number] for number in rows[ROW_NUMBER]] == fits


def test_tokenized_reward_pairs_are_taken_as_they_are() -> None:
    rows = [{"chosen_ids": [5, 6], "rejected_ids": [7, 8, 9], "margin": 1}]
    expected = [{"chosen_ids": [5, 6], "rejected_ids": [7, 8, 9], "margin": 1.0}]
    assert list(without_numbers(prepare_reward_pairs(Dataset.from_list(rows), None, RewardConfig()))) == expected


def test_rows_of_messages_and_of_text_may_follow_on_long_ones() -> None:
    """The first thousand rows are all too long: what is written for them has no type of its own."""
    long = {"prompt": "one two three four five six " * 3, "chosen": "a", "rejected": "b"}
    rows = ours("dpo", [long] * 1001 + [PAIRS["text"][1]], max_length=12)
    assert [sum(row["chosen_mask"]) for row in rows] == [2]


# ---- sequences


def test_the_sequences_of_a_pair_are_chosen_then_rejected() -> None:
    row = {
        "chosen_ids": [5, 6, 7],
        "rejected_ids": [5, 8],
        "chosen_mask": [False, True, True],
        "rejected_mask": [False, True],
        "ref_chosen_logprobs": [0.0, -1.0, -2.0],
        "ref_rejected_logprobs": [0.0, -3.0],
    }
    batch = pack(sequences_of_pair(row), multiple=8)
    assert batch.tokens.tolist() == [5, 6, 7, 5, 8, 0, 0, 0] and batch.num_sequences == 2
    assert batch["loss_mask"].tolist() == [False, True, True, False, True, False, False, False]
    assert batch["ref_logprobs"].tolist() == [0, -1, -2, 0, -3, 0, 0, 0]
    without = {name: values for name, values in row.items() if not name.startswith("ref")}
    assert "ref_logprobs" not in pack(sequences_of_pair(without))


def test_orpos_chosen_is_learnt_whole_and_completions_are_marked() -> None:
    row = {
        "chosen_ids": [5, 6, 7, 9],
        "rejected_ids": [5, 6, 8],
        "chosen_mask": [False, False, True, True],
        "rejected_mask": [False, False, True],
    }
    batch = pack(sequences_of_orpo_pair(row))
    assert batch["loss_mask"].tolist() == [False, True, True, True, False, False, True]
    assert batch["completion_mask"].tolist() == [0, 0, 1, 1, 0, 0, 1]
    bare = {"chosen_ids": [7, 9], "rejected_ids": [8, 9], "chosen_mask": [True, True], "rejected_mask": [True, True]}
    assert pack(sequences_of_orpo_pair(bare))["completion_mask"].tolist() == [0, 1, 0, 1]


def test_rewards_last_tokens_are_scored_and_both_have_the_margin() -> None:
    row = {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8], "margin": 0.5}
    batch = pack(sequences_of_reward_pair(row))
    assert batch["loss_mask"].tolist() == [False, False, True, False, True]
    assert batch["margin"].tolist() == [0.5, 0.5]
    assert "margin" not in pack(sequences_of_reward_pair({"chosen_ids": [5, 6], "rejected_ids": [5, 8]}))


def test_rewards_score_is_that_of_the_last_token_which_is_no_pad() -> None:
    row = {"chosen_ids": [5, 6, 2, 2], "rejected_ids": [2, 5, 2, 8]}
    masks = [sequence["loss_mask"] for sequence in sequences_of_reward_pair(row, pad=2)]
    assert masks == [[False, True, False, False], [False, False, False, True]]
    pads = {"chosen_ids": [5, 2, 2], "rejected_ids": [2, 2]}
    masks = [sequence["loss_mask"] for sequence in sequences_of_reward_pair(pads, pad=2)]
    assert masks == [[False, True, False], [False, True]]
    rows = Dataset.from_list([row, {"chosen_ids": [5, 6], "rejected_ids": [5, 2, 2]}])
    with pytest.raises(UserError, match=r"row 1: its rejected has 3 tokens and those .* are pads \(2\)"):
        prepare_reward_pairs(rows, None, RewardConfig(), pad=2)
    assert len(prepare_reward_pairs(rows, None, RewardConfig(), pad=7)) == 2


# ---- bad rows

GOOD = PAIRS["text"][0]
CHAT = PAIRS["messages"][0]
BAD_ROWS: dict[str, tuple[str, Rows, dict[str, Any], str]] = {
    "no rejected": ("dpo", [GOOD, {**GOOD, "rejected": None}], {}, "row 1: it has no 'rejected'"),
    "text and messages": ("dpo", [{**GOOD, "rejected": [BLUE]}], {}, "row 0: .*all be text or all be lists"),
    "messages after a text": ("dpo", [{"prompt": [USER], "chosen": "a", "rejected": "b"}], {}, "row 0: .*all be text"),
    "no message": ("dpo", [CHAT, {**CHAT, "chosen": []}], {}, "row 1: .*at least one message"),
    "no shared message": ("dpo", [{"chosen": [USER, BLUE], "rejected": [WHY, AIR]}], {}, "row 0: its prompt has no"),
    "no shared message of orpo": ("orpo", [{"chosen": [USER], "rejected": [USER]}], {}, "row 0: its prompt has no"),
    "nothing at all": ("dpo", [{"prompt": "", "chosen": "", "rejected": "a"}], {}, "row 0: its chosen has no token"),
    "an empty completion": (
        "dpo",
        [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": []}],
        {},
        "row 0: its rejected has no token to learn of",
    ),
    "tokens without a prompt": ("dpo", [{"chosen_ids": [6], "rejected_ids": [7]}], {}, "row 0: it has no 'prompt_ids'"),
    "old columns": ("reward", [{"chosen_input_ids": [6], "rejected_input_ids": [7]}], {}, "is now 'chosen_ids'"),
    "halves as wholes": ("reward", TOKENIZED, {}, "row 0: it has prompt_ids beside chosen_ids"),
    "one token": ("reward", [{"prompt": "", "chosen": "", "rejected": "a"}], {}, "row 0: its chosen has 1 tokens"),
    "no margin": ("reward", [{**GOOD, "margin": 1.0}, {**GOOD, "margin": None}], {}, "row 1: it has no 'margin'"),
    "endless margin": ("reward", [{**GOOD, "margin": float("nan")}], {}, "row 0: its margin=nan must be a finite"),
    "no room": ("dpo", [GOOD], {"max_length": 3}, "all 1 rows are too long for max_length=3"),
    "broken tools": ("dpo", [{**CHAT, "tools": "[add"}], {}, "row 0: .*'tools'.*JSON"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_its_number(case: str) -> None:
    kind, rows, fields, message = BAD_ROWS[case]
    with pytest.raises(UserError, match=message) as caught:
        ours(kind, rows, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_token_that_the_model_has_not_is_named(kind: str) -> None:
    rows = TOKENIZED if kind == "dpo" else [{"chosen_ids": [5, 6], "rejected_ids": [3, 12]}]
    expected = "row 1: token id 12 at place 0" if kind == "dpo" else "row 0: token id 12 at place 1"
    with pytest.raises(UserError, match=expected):
        PREPARE[kind](Dataset.from_list(rows), None, CONFIGS[kind](), vocab_size=12)


@pytest.mark.parametrize("kind", PREPARE)
def test_text_needs_a_tokenizer_with_an_end_token(kind: str) -> None:
    with pytest.raises(UserError, match="need a tokenizer"):
        PREPARE[kind](Dataset.from_list([GOOD]), None, CONFIGS[kind]())
    with pytest.raises(UserError, match="row 0: .*eos_token names one"):
        PREPARE[kind](Dataset.from_list([GOOD]), make_tokenizer(eos_token=None), CONFIGS[kind]())


@pytest.mark.parametrize("kind", PREPARE)
def test_the_same_answer_twice_is_kept_and_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": [SYSTEM, USER], "chosen": [FOX], "rejected": [FOX]}]
    logging.Logger.warning_once.cache_clear()  # transformers says the same sentence once in a process
    (row,) = ours(kind, rows)
    assert row["chosen_ids"] == row["rejected_ids"]
    assert "teach no preference" in caplog.text
