"""Tokens and loss masks of every SFT format against TRL 1.16's own preparation of the same rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trl.trainer.sft_trainer import SFTTrainer

from megalign.config import SFTConfig
from megalign.data.packing import sequences_of
from megalign.data.rows import numbers_of, without_numbers
from megalign.data.supervised import prepare_sft
from megalign.errors import UserError
from tests.data.tokenizers_made_here import TEMPLATES, make_tokenizer, marked, unmarked

USER = {"role": "user", "content": "What color is the sky?"}
ANSWER = {"role": "assistant", "content": "It is blue."}
WHY = {"role": "user", "content": "Why?"}
BECAUSE = {"role": "assistant", "content": "Because of the air."}

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"text": "The quick brown fox"},
        {"text": "jumps over.<|endoftext|>"},
        {"text": "one two three"},
    ],
    "other text column": [{"body": "The quick brown fox"}],
    "prompt and completion": [
        {"prompt": "What color is the sky? ", "completion": "It is blue."},
        {"prompt": "1 + 2 =", "completion": " 3"},
        {"prompt": "", "completion": "one two"},
    ],
    "conversational prompt and completion": [
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER, ANSWER, WHY], "completion": [BECAUSE]},
    ],
    "messages": [{"messages": [USER, ANSWER, WHY, BECAUSE]}, {"messages": [USER, ANSWER]}],
    "sharegpt": [
        {
            "conversations": [
                {"from": "user", "value": USER["content"]},
                {"from": "assistant", "value": "It is blue."},
            ]
        }
    ],
    "tokens": [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}],
    "tokens with labels": [{"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}],
    "tokens with both masks": [
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}
    ],
}
CONVERSATIONAL = ("conversational prompt and completion", "messages", "sharegpt")


def trl_rows(rows: list[dict[str, Any]], template: str, args: SFTConfig) -> list[dict[str, Any]]:
    tokenizer = make_tokenizer(template)
    is_completion = "completion" in rows[0] or "completion_mask" in rows[0]
    only = is_completion if args.completion_only_loss is None else args.completion_only_loss
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=only)
    prepared = SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, args, args.packing, None, "train"
    )
    return [
        {"input_ids": row["input_ids"], "loss_mask": [label != -100 for label in row["labels"]]}
        | ({"seq_lengths": row["seq_lengths"]} if "seq_lengths" in row else {})
        for row in prepared
    ]


def config(**fields: Any) -> SFTConfig:
    return SFTConfig(**{"shuffle_dataset": False, **fields})


def our_rows(rows: list[dict[str, Any]], template: str | None, args: SFTConfig) -> list[dict[str, Any]]:
    return list(without_numbers(prepare_sft(Dataset.from_list(rows), make_tokenizer(template), args)))


@pytest.mark.parametrize("completion_only", [None, False])
@pytest.mark.parametrize("form", ROWS)
def test_rows_of_every_format_are_trls(form: str, completion_only: bool | None) -> None:
    args = config(completion_only_loss=completion_only, dataset_text_field="body" if "other" in form else "text")
    template = unmarked(TEMPLATES["chatml"])
    ours = our_rows(ROWS[form], template, args)
    assert ours == trl_rows(ROWS[form], template, args)
    assert len(ours) == len(ROWS[form])


@pytest.mark.parametrize("completion_only", [None, False])
@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize("form", CONVERSATIONAL)
def test_assistant_only_loss_is_trls_with_a_marked_template(form: str, name: str, completion_only: bool | None) -> None:
    args = config(assistant_only_loss=True, completion_only_loss=completion_only)
    expected = trl_rows(ROWS[form], marked(TEMPLATES[name]), args)
    assert our_rows(ROWS[form], unmarked(TEMPLATES[name]), args) == expected
    assert our_rows(ROWS[form], marked(TEMPLATES[name]), args) == expected


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("form", ["prompt and completion", "messages", "tokens with labels"])
def test_rows_are_cut_and_fully_masked_ones_dropped_as_trl_does(form: str, mode: str) -> None:
    args = config(max_length=2 if "tokens" in form else 6, truncation_mode=mode)
    template = unmarked(TEMPLATES["chatml"])
    ours = our_rows(ROWS[form], template, args)
    assert ours == trl_rows(ROWS[form], template, args)
    assert max(len(row["input_ids"]) for row in ours) <= args.max_length
    if form == "prompt and completion" and mode == "keep_start":
        assert len(ours) < len(ROWS[form])


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packs_are_trls(strategy: str) -> None:
    args = config(packing=True, packing_strategy=strategy, max_length=12)
    template = unmarked(TEMPLATES["chatml"])
    rows = ROWS["prompt and completion"] * 3
    ours, theirs = our_rows(rows, template, args), trl_rows(rows, template, args)
    assert [row["input_ids"] for row in ours] == [row["input_ids"] for row in theirs]
    assert [row["loss_mask"] for row in ours] == [row["loss_mask"] for row in theirs]
    lengths = [[len(row["input_ids"])] if strategy == "wrapped" else row["seq_lengths"] for row in theirs]
    assert [row["seq_lengths"] for row in ours] == lengths
    sequences = [len(sequence["tokens"]) for row in ours for sequence in sequences_of(row)]
    assert sequences == [length for row in lengths for length in row]


def test_packing_shuffles_first_when_rows_are_shuffled_as_trl_does() -> None:
    args = config(packing=True, max_length=24, shuffle_dataset=True)
    rows = [{"text": word} for word in ["one", "two", "three", "four", "five", "six", "user", "tool"]]
    # TRL shuffles the packs once more; our sampler does that, epoch by epoch.
    theirs = trl_rows(rows, "", args)
    ours = our_rows(rows, "", args)
    assert sorted(row["input_ids"] for row in ours) == sorted(row["input_ids"] for row in theirs)
    assert ours != our_rows(rows, "", config(packing=True, max_length=24))


def test_packing_of_the_evaluation_rows_can_differ() -> None:
    dataset = Dataset.from_list(ROWS["text"])
    rows = without_numbers(prepare_sft(dataset, make_tokenizer(), config(packing=True), packing=False))
    assert rows.column_names == ["input_ids", "loss_mask"] and len(rows) == 3


def test_the_completion_of_messages_is_their_last_message() -> None:
    template = unmarked(TEMPLATES["chatml"])
    rows = our_rows(ROWS["messages"], template, config(completion_only_loss=True))
    expected = our_rows(ROWS["conversational prompt and completion"], template, config())
    assert rows == expected[::-1]


def test_a_completion_mask_that_is_there_counts_and_can_be_switched_off() -> None:
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}]
    assert our_rows(rows, None, config())[0]["loss_mask"] == [False, True, True]
    assert our_rows(rows, None, config(completion_only_loss=False))[0]["loss_mask"] == [True, True, True]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("packing", [False, True])
def test_pads_are_left_out_with_what_masks_and_labels_say_of_them(side: str, packing: bool) -> None:
    left, right = (2 if side in ("left", "both") else 0), (3 if side in ("right", "both") else 0)

    def padded(values: list[int], pad: int) -> list[int]:
        return [pad] * left + values + [pad] * right

    alone = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}
    rows = {
        "completion_mask": [0, 1, 1],
        "assistant_masks": [0, 1, 1],
        "labels": [-100, 6, 7],
    }
    expected = our_rows([alone], None, config(packing=packing))
    for name, values in rows.items():
        row = {"input_ids": padded([5, 6, 7], 0), "attention_mask": padded([1, 1, 1], 0)}
        pad = 0 if name == "labels" else 1  # the pad's own id, and what a careless mask says
        assert our_rows([{**row, name: padded(values, pad)}], None, config(packing=packing)) == expected
    plain = {"input_ids": padded([5, 6, 7], 0), "attention_mask": padded([1, 1, 1], 0)}
    assert our_rows([plain], None, config())[0] == {"input_ids": [5, 6, 7], "loss_mask": [True] * 3}
    others = {"input_ids": [0, 0], "attention_mask": [0, 0]}
    assert len(our_rows([plain, others], None, config())) == 1  # it has no token


def test_token_ids_may_come_from_a_dataset_in_numpys_format() -> None:
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}]
    dataset = Dataset.from_list(rows).with_format("numpy")
    found = prepare_sft(dataset, None, config())
    assert numbers_of(found[0]) == [0]
    assert without_numbers(found).with_format(None).to_list() == our_rows(rows, None, config())


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packs_without_a_loss_token_are_dropped_and_none_left_is_an_error(strategy: str) -> None:
    args = config(packing=True, packing_strategy=strategy, max_length=4)
    masked = {"input_ids": [5, 6, 7, 8], "completion_mask": [0] * 4}
    learnt = {"input_ids": [9, 10, 11, 12], "completion_mask": [0, 0, 1, 1]}
    packs = our_rows([masked, learnt, masked], None, args)
    assert [pack["input_ids"] for pack in packs] == [learnt["input_ids"]]
    with pytest.raises(UserError, match="none of the 2 packs has a loss token within max_length=4"):
        our_rows([masked, masked], None, args)


def test_tokenized_rows_need_no_tokenizer() -> None:
    rows = prepare_sft(Dataset.from_list(ROWS["tokens with labels"]), None, config())
    assert list(without_numbers(rows)) == [{"input_ids": [5, 6, 7], "loss_mask": [False, True, False]}]
    with pytest.raises(UserError, match="need a tokenizer"):
        prepare_sft(Dataset.from_list(ROWS["text"]), None, config())


@pytest.mark.parametrize(("ids", "place", "token"), [([9, 10], 1, 10), ([-1], 0, -1), ([700, 3], 0, 700)])
def test_a_token_that_the_model_has_not_is_named(ids: list[int], place: int, token: int) -> None:
    rows = Dataset.from_list([{"input_ids": [0, 9]}, {"input_ids": ids}])
    with pytest.raises(UserError, match=f"row 1: token id {token} at place {place} .*vocab_size being 10;"):
        prepare_sft(rows, None, config(), vocab_size=10)
    assert len(prepare_sft(rows.select([0]), None, config(), vocab_size=10)) == 1


def test_a_tokenizer_longer_than_the_model_is_found_by_the_first_row_that_shows_it() -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens("<extra>")
    rows = Dataset.from_list([{"text": "one"}, {"text": "<extra>"}])
    with pytest.raises(UserError, match=f"row 1: token id {size} .*vocab_size being {size};"):
        prepare_sft(rows, tokenizer, config(), vocab_size=size)
    assert len(prepare_sft(rows, tokenizer, config(), vocab_size=size + 1)) == 2


def test_the_shuffle_before_packing_draws_from_the_data_seed() -> None:
    rows = [{"text": word} for word in ["one", "two", "three", "four", "five", "six", "user", "tool"]]
    packs = {"packing": True, "max_length": 24, "shuffle_dataset": True}
    ours = our_rows(rows, "", config(**packs, data_seed=7))
    assert ours == our_rows(rows, "", config(**packs, seed=7)) != our_rows(rows, "", config(**packs))


def test_sharegpt_names_become_roles() -> None:
    conversation = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    template = unmarked(TEMPLATES["chatml"])
    args = config(assistant_only_loss=True)
    ours = our_rows([{"conversations": conversation}], template, args)
    assert ours == our_rows([{"messages": [USER, ANSWER]}], template, args)


def test_tools_and_template_arguments_of_a_row_reach_the_template() -> None:
    template = "{{ tools[0]['name'] + greeting }}" + unmarked(TEMPLATES["chatml"])
    row = {
        "messages": [USER, ANSWER],
        "tools": '[{"name": "add"}]',
        "chat_template_kwargs": {"greeting": " Hi"},
    }
    ids = our_rows([row], template, config())[0]["input_ids"]
    assert make_tokenizer().decode(ids).startswith("add Hi<|im_start|>")


def test_every_pass_over_the_rows_has_as_many_processes_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fields = ROWS["prompt and completion"], {"max_length": 6}
    alone = our_rows(rows, None, config(**fields))
    asked: list[int | None] = []

    def noting(method: Any) -> Any:
        def call(self: Dataset, *given: Any, **options: Any) -> Dataset:
            asked.append(options.get("num_proc"))
            return method(self, *given, **options)

        return call

    for name in ("map", "filter"):
        monkeypatch.setattr(Dataset, name, noting(getattr(Dataset, name)))
    assert our_rows(rows, None, config(**fields, dataset_num_proc=2)) == alone
    assert asked and set(asked) == {2}


BAD_ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no text": ([{"text": "one"}, {"text": None}], {}, "row 1.*'text'"),
    "no known column": ([{"body": "one"}], {}, "row 0.*'body'.*dataset_text_field"),
    "prompt alone": ([{"prompt": "one"}], {}, "row 0.*'completion'"),
    "half conversational": ([{"prompt": [USER], "completion": "x"}], {}, "row 0.*both"),
    "messages that are text": ([{"messages": "one"}], {}, "row 0.*role"),
    "number as text": ([{"text": 3}], {}, "row 0.*text"),
    "short mask": ([{"input_ids": [5, 6], "labels": [5]}], {}, "row 0.*1 values for 2"),
    "shifted labels": ([{"input_ids": [5, 6], "labels": [6, 7]}], {}, "row 0.*shift"),
    "mask of text": (
        [{"input_ids": [5, 6, 7], "completion_mask": ["0", "0", "1"]}],
        {},
        "row 0: completion_mask must be 0 or 1 at each place and is '0' at place 0",
    ),
    "mask with a hole": (
        [{"input_ids": [5, 6], "assistant_masks": [1, None]}],
        {},
        "row 0: assistant_masks must be 0 or 1 .* is None at place 1",
    ),
    "mask of weights": ([{"input_ids": [5, 6], "attention_mask": [1.0, 0.5]}], {}, "row 0: attention_mask .*0.5"),
    "pad inside": (
        [{"input_ids": [5], "attention_mask": [1]}, {"input_ids": [5, 6, 7, 8], "attention_mask": [0, 1, 0, 1]}],
        {},
        "row 1: attention_mask is 0 at place 2, within the row",
    ),
    "fractional ids": ([{"input_ids": [1.0, 2.0, 3.5]}], {}, "row 0: input_ids must be whole .* is 1.0 at place 0"),
    "ids with a hole": ([{"input_ids": [1, None]}], {}, "row 0: input_ids must be whole .* is None at place 1"),
    "ids that are truth": ([{"input_ids": [True, False]}], {}, "row 0: input_ids must be whole .* is True"),
    "ids of text": ([{"input_ids": "abc"}], {}, "row 0: input_ids must be a list .*, not str"),
    "mask that is a number": ([{"input_ids": [5], "labels": 5}], {}, "row 0: labels must be a list .*, not int"),
    "completion of the user": (
        [{"messages": [USER, ANSWER, WHY]}],
        {"completion_only_loss": True},
        "row 0: completion_only_loss=True .* of role 'user'; end with",
    ),
    "completion alone": ([{"messages": [ANSWER]}], {"completion_only_loss": True}, "row 0: .*of these 1 the last"),
    "template arguments of text": (
        [{"messages": [USER, ANSWER], "chat_template_kwargs": "x"}],
        {},
        "row 0: its chat_template_kwargs='x' must be a mapping",
    ),
    "assistant of text": ([{"text": "one"}], {"assistant_only_loss": True}, "row 0.*assistant_only_loss"),
    "no assistant": ([{"messages": [USER]}], {"assistant_only_loss": True}, "row 0.*assistant_only_loss"),
    "completion of text": ([{"text": "one"}], {"completion_only_loss": True}, "row 0.*completion_only_loss"),
    "tools that are no JSON": ([{"messages": [USER, ANSWER], "tools": "[add"}], {}, "row 0: .*'tools'.*JSON"),
    "a later message without a role": (
        [{"messages": [USER, {"content": "It is blue."}]}],
        {"assistant_only_loss": True},
        "row 0: message 1 has no 'role', only 'content'",
    ),
    "nothing left": ([{"prompt": "one two", "completion": "x"}], {"max_length": 2}, "max_length=2"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_its_number(case: str) -> None:
    rows, fields, message = BAD_ROWS[case]
    with pytest.raises(UserError, match=message) as caught:
        our_rows(rows, unmarked(TEMPLATES["chatml"]), config(**fields))
    assert "\n" not in str(caught.value)


def test_text_needs_an_end_token() -> None:
    with pytest.raises(UserError, match="eos_token"):
        prepare_sft(Dataset.from_list(ROWS["text"]), make_tokenizer(eos_token=None), config())
