"""Built-in rewards against trl.rewards on the same cases, and how names find functions."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import trl.rewards

from megalign.errors import UserError
from megalign.rollout import math_answers
from megalign.rollout import reward_functions as ours
from megalign.rollout.math_answers import MathAnswers, Verdict

CASES = [  # (completion, solution)
    (r"My answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"My answer is \boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"\boxed{0.5}", r"$\frac{1}{2}$"),
    (r"The answer is $12$", "12"),
    (r"12", "12"),  # no LaTeX: not an answer
    (r"\boxed{12 \text{ cm}}", "12"),
    (r"\boxed{3} then \boxed{4}", "4"),
    (r"\boxed{x+1}", "$1+x$"),
    (r"\boxed{1", "1"),
    ("", "1"),
    (r"\boxed{7}", "no number here"),  # the gold cannot be parsed
    (r"<think>\boxed{3}</think> so \boxed{4}", "4"),
    (r"<think>\boxed{4}", "4"),
    (r"<think>a</think>\boxed{7}", "no number here"),
    (r"<think>a</think>b</think>\boxed{4}", "4"),
    (r"<think>a<answer>\boxed{5}", "5"),
]
THINK_CASES = [
    "<think>\nreason\n</think>\nanswer",
    "<think>reason</think>",
    "<think>\nreason\nanswer",
    "before <think>reason</think> answer",
    "<think>a<think>b</think>c",
    "<think>a</think>b<think>c</think>",
    "\n<think>a</think>b",
    "",
]
IDS = [
    [],
    [1],
    [1, 2],
    [1, 2, 3, 4],
    [5] * 6,
    [1, 2, 1, 2, 1, 2],
    list(range(80)),
    list(range(81)),
    [3] * 90,
    [3] * 101,
]


def messages(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward"])
def test_accuracy_is_trls(name: str) -> None:
    texts, solutions = [text for text, _ in CASES], [solution for _, solution in CASES]
    logged: dict[str, dict[str, list[Any]]] = {"ours": {}, "trls": {}}
    expected = getattr(trl.rewards, name)(messages(texts), solution=solutions, log_extra=logged["trls"].__setitem__)
    assert getattr(ours, name)(messages(texts), solution=solutions, log_extra=logged["ours"].__setitem__) == expected
    assert logged["ours"] == logged["trls"]
    # Plain text completions, which TRL's cannot take.
    assert getattr(ours, name)(completions=texts, solution=solutions) == expected
    assert {None, 0.0, 1.0} == set(expected)


def test_reasoning_delimiters_are_the_callers() -> None:
    texts, solutions = [text for text, _ in CASES], [solution for _, solution in CASES]
    delimiters = ["<answer>", "</think>"]
    assert ours.reasoning_accuracy_reward(texts, solutions, delimiters) == trl.rewards.reasoning_accuracy_reward(
        messages(texts), solutions, delimiters
    )


def test_think_format_is_trls() -> None:
    expected = trl.rewards.think_format_reward(messages(THINK_CASES))
    assert ours.think_format_reward(messages(THINK_CASES)) == expected
    assert set(expected) == {0.0, 1.0}


@pytest.mark.parametrize("limits", [(100, 20), (100, 0), (6, 6), (80, 1)])
def test_overlong_punishment_is_trls(limits: tuple[int, int]) -> None:
    expected = trl.rewards.get_soft_overlong_punishment(*limits)(IDS)
    assert ours.get_soft_overlong_punishment(*limits)(completion_ids=IDS) == expected


@pytest.mark.parametrize("options", [{}, {"ngram_size": 1}, {"ngram_size": 2, "max_penalty": -3.0}])
def test_repetition_penalty_is_trls(options: dict[str, Any]) -> None:
    expected = trl.rewards.get_repetition_penalty_reward(**options)(IDS)
    assert ours.get_repetition_penalty_reward(**options)(completion_ids=IDS) == pytest.approx(expected)


def test_cosine_reward_is_trls() -> None:
    texts = [r"\boxed{1}", r"\boxed{2}", "none"] * 3 + [r"\boxed{1}"]
    solutions = ["1"] * 9 + ["no number"]
    options = {"max_len": 100, "min_value_wrong": -2.0, "max_value_wrong": -0.25, "max_value_correct": 3.0}
    expected = trl.rewards.get_cosine_scaled_reward(**options)(messages(texts), solutions, IDS)
    found = ours.get_cosine_scaled_reward(**options)(messages(texts), solutions, IDS)
    assert found[-1] is None and expected[-1] is None
    assert found[:-1] == pytest.approx(expected[:-1])


def test_length_reward_counts_tokens() -> None:
    assert ours.length_reward(completion_ids=[[4, 5], []]) == [-2.0, 0.0]


def test_an_answer_that_takes_forever_is_worth_nothing_and_harms_no_other() -> None:
    endless = r"\boxed{9^{9^{9^{9^{9}}}}}"
    verdicts = MathAnswers(seconds_an_answer=3).judge([(endless, "$9^{9^{9^{9^{8}}}}+1$"), (r"\boxed{2}", "2")])
    assert verdicts[0].reward == 0.0
    assert verdicts[1] == Verdict(1.0, "[2, '2']", "[2, '2']")


def test_a_process_with_many_files_is_answered() -> None:
    read, write = os.pipe()
    with os.fdopen(os.dup2(read, 1500)) as far, os.fdopen(write, "w") as near:
        os.close(read)
        assert math_answers._read_line(far, 0.01) == ""
        near.write("an answer\n")
        near.flush()
        assert math_answers._read_line(far, 10.0) == "an answer\n"


def test_a_judge_that_died_between_answers_is_started_again() -> None:
    answers, right = MathAnswers(), [(r"\boxed{2}", "2")]
    assert answers.judge(right)[0].reward == 1.0
    assert answers._process is not None
    answers._process.kill()
    answers._process.wait()
    assert answers.judge(right)[0].reward == 1.0


def test_names_find_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def shortness(completions, **kwargs):\n    return [1.0]\n")
    assert ours.resolve("accuracy_reward") is ours.accuracy_reward
    assert ours.resolve("my_rewards.py:shortness")(completions=[""]) == [1.0]
    assert ours.resolve(f"{tmp_path}/my_rewards.py:shortness")(completions=[""]) == [1.0]
    assert ours.resolve("my_rewards.shortness")(completions=[""]) == [1.0]
    assert ours.resolve("megalign.rollout.reward_functions.length_reward") is ours.length_reward


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acuracy_reward", ["'acuracy_reward'", "did you mean accuracy_reward?"]),
        ("my_rewards.py:shortnes", ["'shortnes'", "did you mean shortness?"]),
        ("absent.py:f", ["'absent.py' does not exist"]),
        ("absent_module.f", ["no module 'absent_module'"]),
        ("json.JSONDecodr", ["'JSONDecodr'", "did you mean JSONDecoder?"]),
        ("get_cosine_scaled_reward", ["takes numbers", "rewards.py:reward"]),
        ("org/reward-model", ["'org/reward-model' is no directory in ", "a reward model's directory"]),
        ("empty", ["'empty' is a directory without config.json", "ForSequenceClassification"]),
    ],
)
def test_a_wrong_name_is_named_with_the_nearest(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "my_rewards.py").write_text("def shortness(completions, **kwargs):\n    return [1.0]\n")
    with pytest.raises(UserError) as error:
        ours.resolve(name)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os\ndef f(:\n", ["SyntaxError", "line 2", "invalid syntax"]),
        ("import os\n\nimport absent_package\n", ["ModuleNotFoundError", "line 3", "'absent_package'"]),
        ("from os import absent_name\n", ["ImportError", "line 1", "'absent_name'"]),
        ("def f():\n    raise RuntimeError('no key\\nset one')\nf()\n", ["RuntimeError", "line 3", "no key"]),
    ],
)
@pytest.mark.parametrize("name", ["{module}.py:f", "{module}.f"])
def test_a_module_that_cannot_be_imported_is_one_line(
    name: str, text: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = f"broken_{zlib.crc32(text.encode())}"
    (tmp_path / f"{module}.py").write_text(text)
    with pytest.raises(UserError) as error:
        ours.resolve(name.format(module=module))
    assert all(word in str(error.value) for word in [f"{module}.py", *words]), str(error.value)
    assert "\n" not in str(error.value)


def test_the_overlong_punishments_name_has_trls_numbers() -> None:
    ids = [[0] * 1000, [0] * 1100, [0] * 1300]
    expected = trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)(ids)
    assert ours.resolve("get_soft_overlong_punishment")(completion_ids=ids) == expected
