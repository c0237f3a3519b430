"""Assistant masks derived from renders against masks of the same templates with generation marks."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from trl.data_utils import common_prefix_length as trl_common_prefix_length

from megalign.data.chat import (
    adapt_tokenizer,
    as_messages,
    assistant_tokens,
    chat_ids,
    common_prefix_length,
    is_conversation,
    load_tokenizer,
)
from megalign.errors import UserError
from tests.data.tokenizers_made_here import TEMPLATES, make_tokenizer, marked, unmarked

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
USER = {"role": "user", "content": "What color is the sky?"}
ANSWER = {"role": "assistant", "content": "It is blue."}
WHY = {"role": "user", "content": "Why?"}
BECAUSE = {"role": "assistant", "content": "Because of the air."}
THOUGHT = {"role": "assistant", "content": "<think>\nLet me see.\n</think>\n\nIt is blue."}
CONVERSATIONS = {
    "one turn": [USER, ANSWER],
    "two turns": [USER, ANSWER, WHY, BECAUSE],
    "question last": [USER, ANSWER, WHY],
    "two answers in a row": [USER, ANSWER, BECAUSE],
    "equal answers": [USER, ANSWER, USER, ANSWER],
    "thoughts": [USER, THOUGHT, WHY, THOUGHT],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_without_marks_are_those_with_marks(name: str, conversation: list[dict[str, str]]) -> None:
    expected_tokenizer = make_tokenizer(marked(TEMPLATES[name]))
    expected = expected_tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = assistant_tokens(make_tokenizer(unmarked(TEMPLATES[name])), conversation, options={})
    assert ids == expected["input_ids"]
    assert mask == [bool(bit) for bit in expected["assistant_masks"]]
    assert 0 < sum(mask) < len(mask)


def test_marks_in_the_template_decide() -> None:
    template = marked(TEMPLATES["chatml"]).replace("<|im_end|>' + '\n' }}{% endgen", "' }}{% endgen")
    tokenizer = make_tokenizer(template)
    ids, mask = assistant_tokens(tokenizer, [USER, ANSWER], options={})
    assert tokenizer.decode([token for token, mine in zip(ids, mask, strict=True) if mine]) == "It is blue."


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "qwen3"])
def test_masks_of_the_real_templates_cover_each_answer_to_its_end_of_turn(family: str) -> None:
    tokenizer = make_tokenizer((TRL_TEMPLATES / f"{family}.jinja").read_text())
    ids, mask = assistant_tokens(tokenizer, [USER, ANSWER, WHY, BECAUSE], options={})
    mine = tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
    end = "<|eot_id|>" if family == "llama3" else "<|im_end|>\n"
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert mine == f"It is blue.{end}{thought}Because of the air.{end}"


def test_the_mask_of_llama3_is_that_of_trls_training_template() -> None:
    conversation = [USER, {"role": "assistant", "content": "  It is blue. "}, WHY, BECAUSE]
    expected = make_tokenizer((TRL_TEMPLATES / "llama3_training.jinja").read_text()).apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = make_tokenizer((TRL_TEMPLATES / "llama3.jinja").read_text())
    ids, mask = assistant_tokens(tokenizer, conversation, options={})
    assert ids == expected["input_ids"]
    assert mask == [bool(bit) for bit in expected["assistant_masks"]]


def test_an_answer_that_opens_the_conversation_is_found() -> None:
    tokenizer = make_tokenizer(unmarked(TEMPLATES["chatml"]))
    ids, mask = assistant_tokens(tokenizer, [ANSWER, WHY, BECAUSE], options={})
    mine = tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
    assert mine == "It is blue.<|im_end|>\nBecause of the air.<|im_end|>\n"


def test_a_template_that_renders_earlier_turns_anew_is_refused() -> None:
    template = "{{ messages | length }}"
    template += "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(UserError, match="chat_template_path"):
        assistant_tokens(make_tokenizer(template), [USER, ANSWER, WHY, BECAUSE], options={})


def test_what_a_template_refuses_is_one_line_of_error() -> None:
    tokenizer = make_tokenizer(unmarked(TEMPLATES["plain"]))
    with pytest.raises(UserError, match="only user and assistant"):
        chat_ids(tokenizer, [{"role": "tool", "content": "3"}], options={})
    with pytest.raises(UserError, match="only user and assistant"):
        marked_tokenizer = make_tokenizer(marked(TEMPLATES["plain"]))
        assistant_tokens(marked_tokenizer, [{"role": "tool", "content": "3"}, ANSWER], options={})
    with pytest.raises(UserError, match="refuses the messages: .*list"):
        chat_ids(tokenizer, [{"role": "user", "content": ["a part"]}], options={})
    with pytest.raises(UserError, match="chat_template_path"):
        chat_ids(make_tokenizer(None), [USER], options={})


def test_sharegpt_messages_and_empty_keys_of_tables_are_translated() -> None:
    messages = as_messages(
        [
            {"from": "human", "value": "Hi", "tool_calls": None},
            {"from": "gpt", "value": "Hello", "tool_calls": None},
            {"role": "system", "content": "x"},
        ]
    )
    assert messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "system", "content": "x"},
    ]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    assert as_messages([calls]) == [{name: value for name, value in calls.items() if name != "name"}]
    with pytest.raises(UserError, match="message 1 must have role and content, and is a str"):
        as_messages([USER, "Hello"])
    assert is_conversation([{"from": "human", "value": "Hi"}]) and is_conversation([USER])
    assert not is_conversation("Hi") and not is_conversation([]) and not is_conversation(["Hi"])


@pytest.mark.parametrize(("one", "other"), [([1, 2, 3], [1, 2, 4]), ([1], [1, 2]), ([], [1]), ([2], [1])])
def test_common_prefix_is_trls(one: list[int], other: list[int]) -> None:
    assert common_prefix_length(one, other) == trl_common_prefix_length(one, other)


def test_a_tokenizer_gets_the_end_token_and_template_that_are_asked_for(tmp_path: Path) -> None:
    make_tokenizer(TEMPLATES["chatml"]).save_pretrained(tmp_path / "model")
    (tmp_path / "other.jinja").write_text("{{ messages[0]['content'] }}")
    loaded = load_tokenizer(str(tmp_path / "model"))
    tokenizer = adapt_tokenizer(loaded, eos_token="<|im_end|>", chat_template_path=str(tmp_path / "other.jinja"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(chat_ids(tokenizer, [USER], options={})) == USER["content"]
    with pytest.raises(UserError, match="nosuch"):
        adapt_tokenizer(tokenizer, eos_token="nosuch")
    with pytest.raises(UserError, match=r"nosuch\.jinja"):
        adapt_tokenizer(tokenizer, chat_template_path=str(tmp_path / "nosuch.jinja"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
