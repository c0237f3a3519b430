"""What the engines learn from: rows made here, or those of a .jsonl file."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalign.errors import UserError

Row = dict[str, Any]
NUM_GENERATIONS = 8  # completions of a prompt
# GSM8K's names -> the trainers'
TRAINER_COLUMNS = {"question": "prompt", "answer": "completion"}
NEEDED = {"sft": (), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt",)}


def word_problem(rng: random.Random, num_days: int) -> dict[str, str]:
    """A sum over some days in words, and its solution line by line; 30 tokens a day, or so."""
    name, thing = rng.choice(("Ada", "Ben", "Cleo", "Dan")), rng.choice(("apples", "books", "coins", "stamps"))
    total = rng.randint(2, 20)
    story, solution = [f"{name} has {total} {thing}."], []
    for day in range(1, num_days + 1):
        more = rng.randint(2, 20)
        story.append(f"On day {day} {name} gets {more} more.")
        solution.append(f"After day {day}: {total} + {more} = {total + more}.")
        total += more
    question = f"How many {thing} does {name} have now?"
    return {"prompt": " ".join([*story, question]) + "\n", "completion": "\n".join([*solution, f"#### {total}"])}


def as_pair(row: Row, rng: random.Random) -> Row:
    """The problem with its solution, and with one that leaves out some lines and is off by a bit."""
    *lines, answer = row["completion"].splitlines()
    wrong = int(answer.removeprefix("#### ")) + rng.randint(1, 9)
    rejected = "\n".join([*lines[: rng.randint(0, len(lines))], f"#### {wrong}"])
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}


def make_rows(job: str, count: int, prompt_days: int = 1) -> list[Row]:
    """The rows when no file is given, the same in every run: of 4 to 11 days, GRPO's of `prompt_days`."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        row = word_problem(rng, prompt_days if job == "grpo" else rng.randint(4, 11))
        rows.append(as_pair(row, rng) if job == "dpo" else row)
    return rows


def read_rows(path: Path, job: str, count: int) -> list[Row]:
    """The first `count` rows of a .jsonl file, again from its start when it has fewer."""
    # Imported here: wrong flags are answered without torch.
    from megalign.data.broken import BROKEN
    from megalign.data.json_lines import rows_of_lines

    try:
        found = list(itertools.islice(rows_of_lines(str(path)), count))
    except OSError as error:
        raise UserError(f"--dataset {path} cannot be read ({error.strerror}); give a .jsonl file") from error
    broken = [row[BROKEN] for row in found if BROKEN in row]
    if broken:
        raise UserError(f"--dataset {path}: {broken[0]}; mend the line or take it out")
    if not found:
        raise UserError(f"--dataset {path} has no rows; give a .jsonl file with one row a line")
    named = [_renamed(row) if "question" in row else row for row in found]
    kept: Sequence[str] = NEEDED[job] or tuple(named[0])
    for number, row in enumerate(named, start=1):
        if any(name not in row for name in kept):
            raise UserError(
                f"--dataset {path}: row {number} has the columns {', '.join(row)}, and {job} needs {', '.join(kept)}; "
                "rename or add them"
            )
    return [{name: named[index % len(named)][name] for name in kept} for index in range(count)]


def _renamed(row: Row) -> Row:
    return {TRAINER_COLUMNS.get(name, name): value for name, value in row.items()}


def digit_share(completions: Sequence[Any], **_: Any) -> list[float]:
    """A reward for any text that differs within a group: how much of the completion is digits."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]
