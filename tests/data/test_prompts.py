"""Prompts as tokens, and the errors of rows that cannot be prompts."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from megalign.config import GRPOConfig
from megalign.data.prompts import prepare_prompts
from megalign.data.rows import without_numbers
from megalign.errors import UserError
from tests.data.tokenizers_made_here import TEMPLATES, make_tokenizer, unmarked

USER = {"role": "user", "content": "What color is the sky?"}
TEMPLATE = unmarked(TEMPLATES["chatml"])


def prepared(rows: list[dict[str, Any]], template: str = TEMPLATE, **fields: Any) -> list[dict[str, Any]]:
    limits = {name: fields.pop(name) for name in ("max_positions", "vocab_size") if name in fields}
    args = GRPOConfig(**fields)
    return list(without_numbers(prepare_prompts(Dataset.from_list(rows), make_tokenizer(template), args, **limits)))


def test_messages_end_with_the_generation_prompt_and_other_columns_are_kept() -> None:
    rows = prepared([{"prompt": [USER], "answer": "blue", "level": 3}])
    text = make_tokenizer().decode(rows[0].pop("prompt_ids"))
    assert text.endswith(f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n")
    assert rows == [{"prompt": [USER], "answer": "blue", "level": 3}]


def test_text_is_tokenized_as_it_is() -> None:
    rows = prepared([{"prompt": "1 + 2 ="}])
    assert rows[0]["prompt_ids"] == make_tokenizer()("1 + 2 =")["input_ids"]


def test_the_configs_template_arguments_reach_the_template() -> None:
    rows = prepared([{"prompt": [USER]}], "{{ mood }}" + TEMPLATE, chat_template_kwargs={"mood": "quick"})
    assert make_tokenizer().decode(rows[0]["prompt_ids"]).startswith("quick")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], "row 0.*'prompt'.*'question'"),
        ([{"prompt": "x"}, {"prompt": "y"}, {"prompt": None}], "row 2.*'prompt'"),
        ([{"prompt": "x"}, {"prompt": ""}], "row 1.*no tokens"),
        ([{"prompt": [1, 2]}], "row 0.*text or a list of messages"),
    ],
)
def test_a_row_without_a_prompt_is_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(rows)


def test_a_token_that_the_model_has_not_is_named() -> None:
    rows = [{"prompt": "one"}, {"prompt": "one<extra>"}]
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens("<extra>")
    assert len(prepare_prompts(Dataset.from_list(rows), tokenizer, GRPOConfig(), vocab_size=size + 1)) == 2
    with pytest.raises(UserError, match=rf"row 1: token id {size} .*vocab_size being {size};"):
        prepare_prompts(Dataset.from_list(rows), tokenizer, GRPOConfig(), vocab_size=size)
    with pytest.raises(UserError, match="row 0: token id"):
        prepared([{"prompt": [USER]}], vocab_size=2)


def test_a_prompt_longer_than_the_limit_is_named() -> None:
    rows = [{"prompt": "x"}, {"prompt": "x" * 30}]
    length = len(make_tokenizer()("x" * 30)["input_ids"])
    assert len(prepared(rows, vllm_max_model_length=length + 5, max_completion_length=5)) == 2
    with pytest.raises(UserError, match=f"row 1.*{length} tokens.*limit is {length - 1}"):
        prepared(rows, vllm_max_model_length=length + 4, max_completion_length=5)
    with pytest.raises(UserError, match=f"row 1.*limit is {length - 1}"):
        prepared(rows, max_positions=length + 4, max_completion_length=5)
    with pytest.raises(UserError, match="leaves no room"):
        prepared(rows, vllm_max_model_length=5, max_completion_length=5)
