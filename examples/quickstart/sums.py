"""The task of the quickstart: sums of two one-digit numbers, asked in a chat; a right answer is worth 1."""

from __future__ import annotations

import random
import re
from typing import Any

SYSTEM = "Give the answer as a number."
NUM_HELD_OUT = 11  # of the 55 unordered pairs; both orders of a pair are on the same side


def row(a: int, b: int) -> dict[str, Any]:
    """A conversational prompt-only row with the right answer as a further column."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{a} + {b} = ?"}]
    return {"prompt": messages, "answer": a + b}


def split() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows), the same in every run."""
    pairs = [(a, b) for a in range(10) for b in range(a, 10)]
    held_out = set(random.Random(0).sample(pairs, NUM_HELD_OUT))
    sides: tuple[list[Any], list[Any]] = ([], [])
    for a in range(10):
        for b in range(10):
            sides[(min(a, b), max(a, b)) in held_out].append(row(a, b))
    return sides


def sum_reward(completions: list[list[dict[str, str]]], answer: list[int], **kwargs: Any) -> list[float]:
    """1 where the last number of a completion is the sum, else 0."""
    texts = [completion[0]["content"] for completion in completions]
    numbers = [re.findall(r"\d+", text) for text in texts]
    right = zip(numbers, answer, strict=True)
    return [float(bool(found) and int(found[-1]) == total) for found, total in right]
