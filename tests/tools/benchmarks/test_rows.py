"""What is learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalign.errors import UserError
from tests.jobs.inputs import write_rows
from tools.benchmarks.rows import digit_share, make_rows, read_rows


def test_made_rows_are_right_sums_and_the_same_each_time() -> None:
    rows = make_rows("sft", 20)
    assert rows == make_rows("sft", 20)
    assert rows[:5] == make_rows("sft", 5)
    for row in rows:
        # The first number of the story is the start; every day's "gets N more" is added.
        words = row["prompt"].split()
        added = [int(after) for word, after in zip(words, words[1:], strict=False) if word == "gets"]
        assert row["completion"].endswith(f"#### {int(words[2]) + sum(added)}")


def test_the_prompts_of_grpo_are_as_long_as_asked_for() -> None:
    for days in (1, 8):
        assert {row["prompt"].count("On day") for row in make_rows("grpo", 5, days)} == {days}


def test_made_pairs_have_a_right_answer_and_a_wrong_one() -> None:
    for row in make_rows("dpo", 20):
        right, wrong = (int(row[name].rpartition("#### ")[2]) for name in ("chosen", "rejected"))
        assert set(row) == {"prompt", "chosen", "rejected"} and wrong > right


def test_rows_of_a_file_come_in_order_and_begin_again(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    assert read_rows(file, "sft", 3) == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d"},
        {"prompt": "a", "completion": "b"},
    ]
    assert read_rows(file, "grpo", 1) == [{"prompt": "a"}]


@pytest.mark.parametrize(("job", "needed"), [("grpo", "prompt"), ("dpo", "prompt, chosen, rejected")])
def test_a_file_without_the_jobs_columns_is_refused(job: str, needed: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=f"row 1 has the columns text, and {job} needs {needed}"):
        read_rows(file, job, 1)


def test_a_file_that_holds_something_else_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="cannot be read .No such file"):
        read_rows(file, "sft", 3)
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c"}\n{"prompt\n')
    assert len(read_rows(file, "sft", 1)) == 1
    with pytest.raises(UserError, match="row 2 has the columns prompt, and sft needs prompt, completion; rename"):
        read_rows(file, "sft", 2)
    with pytest.raises(UserError, match="line 4 is no JSON"):
        read_rows(file, "sft", 3)


def test_the_reward_is_the_share_of_digits() -> None:
    chat = [{"role": "assistant", "content": "12"}]
    assert digit_share(["a1", "", chat]) == [0.5, 0.0, 1.0]
