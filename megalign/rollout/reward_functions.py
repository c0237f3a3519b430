"""Reward functions that come with megalign, with TRL's names and answers, and how a name finds a function.

A reward function takes keyword arguments (prompts, completions, completion_ids, the dataset's columns, ...)
and returns one number for each completion, or None where it does not apply.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from megalign.errors import UserError
from megalign.rollout.math_answers import MathAnswers

RewardFunction = Callable[..., Any]
Rewards = list[float | None]
# A completion: text, or one assistant message.
Completions = list[str] | list[list[dict[str, str]]]

_THINK = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)
_ANSWERS = MathAnswers()


def accuracy_reward(
    completions: Completions,
    solution: list[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> Rewards:
    """1 where math-verify finds the LaTeX answer equal to the solution, else 0; None without a gold."""
    return _judge(_texts(completions), solution, log_extra)


def reasoning_accuracy_reward(
    completions: Completions,
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> Rewards:
    """accuracy_reward of what follows the reasoning; 0 where the reasoning never ends."""
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    answers = [_after_reasoning(text, delimiters) for text in _texts(completions)]
    return _judge(answers, solution, log_extra)


def think_format_reward(completions: Completions, **kwargs: Any) -> Rewards:
    """1 where the completion begins with one <think>...</think> block, else 0."""
    return [float(_THINK.match(text) is not None) for text in _texts(completions)]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """DAPO, arXiv 2503.14476 eq. 13: from 0 down to -1 over the last soft_punish_cache tokens, -1 beyond."""

    def soft_overlong_punishment_reward(completion_ids: list[list[int]], **kwargs: Any) -> Rewards:
        start = max_completion_len - soft_punish_cache
        rewards: Rewards = []
        for ids in completion_ids:
            if len(ids) <= start:
                rewards.append(0.0)
            elif len(ids) <= max_completion_len:
                rewards.append((start - len(ids)) / soft_punish_cache)
            else:
                rewards.append(-1.0)
        return rewards

    return soft_overlong_punishment_reward


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """arXiv 2502.03373 C.2: max_penalty times the share of repeated token n-grams; 0 without one."""
    if max_penalty > 0:
        raise UserError(f"max_penalty {max_penalty} must not be positive; give {-max_penalty}")

    def repetition_penalty_reward(completion_ids: list[list[int]], **kwargs: Any) -> Rewards:
        rewards: Rewards = []
        for ids in completion_ids:
            ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
            repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
            rewards.append(repeated * max_penalty if repeated else 0.0)
        return rewards

    return repetition_penalty_reward


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> RewardFunction:
    """arXiv 2502.03373 C.1: accuracy_reward, where short right answers and long wrong ones are worth more."""

    def cosine_scaled_reward(
        completions: Completions, solution: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> Rewards:
        rewards: Rewards = []
        for correct, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            if correct is None:
                rewards.append(None)
                continue
            short, long = (max_value_correct, min_value_correct) if correct else (min_value_wrong, max_value_wrong)
            # Beyond max_len the cosine would rise again.
            progress = min(len(ids) / max_len, 1.0)
            rewards.append(long + 0.5 * (short - long) * (1.0 + math.cos(progress * math.pi)))
        return rewards

    return cosine_scaled_reward


def length_reward(completion_ids: list[list[int]], **kwargs: Any) -> Rewards:
    """Minus the number of tokens; a first reward to try a setup with."""
    return [-float(len(ids)) for ids in completion_ids]


BUILT_IN: dict[str, RewardFunction] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "length_reward": length_reward,
    # TRL's command line gives this name these numbers.
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}
# These make a reward function from numbers that a name cannot carry.
FACTORIES = ("get_repetition_penalty_reward", "get_cosine_scaled_reward")


def resolve(name: str) -> RewardFunction:
    """The function behind a built-in's name, a dotted path (my.module.func) or path/to/file.py:func."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in FACTORIES:
        raise UserError(
            f"reward function {name!r} takes numbers first; write `reward = {name}(...)` in a file "
            "rewards.py and give rewards.py:reward"
        )
    if os.path.isdir(name):
        raise UserError(
            f"reward model {name!r} is a directory without config.json; give that of a *ForSequenceClassification "
            "model, or a function"
        )
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _attribute(name, _module_from_file(path), attribute)
    module_name, _, attribute = name.rpartition(".")
    if module_name and "/" not in name:
        return _attribute(name, _module(name, module_name), attribute)
    if "/" in name:
        raise UserError(
            f"reward {name!r} is no directory in {os.getcwd()} and no function; give a reward model's directory or "
            "path/to/file.py:function"
        )
    near = difflib.get_close_matches(name, BUILT_IN, n=1) or sorted(BUILT_IN)
    raise UserError(
        f"reward function {name!r} is not built in, a dotted path, path/to/file.py:function or a reward model's "
        f"directory; did you mean {near[0]}?"
    )


def _module(name: str, module_name: str) -> Any:
    # A script's neighbours are importable under `python script.py`, not under `python -m megalign`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(error.name or "?"):
            raise _unimportable(f"reward function {name!r}", error) from error
        raise UserError(
            f"reward function {name!r}: there is no module {error.name!r}; check the name, or give "
            "path/to/file.py:function"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise _unimportable(f"reward function {name!r}", error) from error


def _module_from_file(path: str) -> Any:
    if not os.path.isfile(path):
        raise UserError(f"reward file {path!r} does not exist; the path is relative to {os.getcwd()}")
    module_name = f"megalign_reward_{os.path.basename(path)[:-3]}"
    specification = importlib.util.spec_from_file_location(module_name, path)
    assert specification is not None and specification.loader is not None, path
    module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = module
    try:
        specification.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise _unimportable(f"reward file {path!r}", error) from error
    return module


def _unimportable(what: str, error: Exception) -> UserError:
    """The error of a module that fails while it is imported, with the line of it that does."""
    if isinstance(error, SyntaxError):
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        machinery = (__file__, importlib.__file__)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in machinery]
        where = next((frame for frame in frames if not frame.filename.startswith("<frozen")), None)
        file, line = (where.filename, where.lineno) if where else (None, None)
        reason = (str(error).strip().splitlines() or [""])[0]
    return UserError(
        f"{what} cannot be imported: {type(error).__name__} in {file}, line {line}: {reason}; mend it, or try it "
        "with python"
    )


def _attribute(name: str, module: Any, attribute: str) -> RewardFunction:
    members = vars(module)
    if callable(members.get(attribute)):
        return members[attribute]
    functions = [member for member, value in members.items() if callable(value) and not member.startswith("_")]
    near = difflib.get_close_matches(attribute, functions, n=1)
    meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(functions)) or 'no function'}"
    raise UserError(f"reward function {name!r}: {attribute!r} is no function of {module.__name__}; {meant}")


def _texts(completions: Completions) -> list[str]:
    return [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]


def _after_reasoning(text: str, delimiters: list[str]) -> str | None:
    for delimiter in delimiters:
        if delimiter in text:
            return text.split(delimiter)[-1]
    return None


def _judge(
    texts: list[str | None], solutions: list[str], log_extra: Callable[[str, list[Any]], None] | None
) -> Rewards:
    """Verdicts of math-verify; a text of None is unfinished reasoning, worth 0."""
    verdicts = _ANSWERS.judge([(text, gold) for text, gold in zip(texts, solutions, strict=True)])
    if log_extra is not None:
        log_extra("solution", list(solutions))
        log_extra("gold_parsed", [verdict.gold for verdict in verdicts])
        log_extra("answer_parsed", [verdict.answer for verdict in verdicts])
    return [verdict.reward for verdict in verdicts]
