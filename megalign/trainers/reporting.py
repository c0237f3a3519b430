"""What a run tells about itself: means over the logging window, metrics.jsonl, the table of completions."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from megalign.errors import UserError


class MetricsWindow:
    """Values noted since the last log line: the mean of some, the latest of others."""

    def __init__(self) -> None:
        self.means: dict[str, list[float]] = {}
        self.latest: dict[str, float] = {}
        self._parts: list[str] = []  # of what adds up, all that there were

    def add(self, metrics: Mapping[str, float]) -> None:
        """Notes one value a name for the window's mean."""
        for name, value in metrics.items():
            self.means.setdefault(name, []).append(float(value))

    def add_parts(self, parts: Mapping[str, float], *, whole: str) -> None:
        """Notes what adds up to `whole`, which is among them: where a step is without a part, it took nothing."""
        before = len(self.means.get(whole, ()))
        self._parts += [name for name in parts if name not in self._parts]
        for name in self._parts:
            self.means.setdefault(name, [0.0] * before).append(float(parts.get(name, 0.0)))

    def set(self, **metrics: float) -> None:
        """Notes values of which only the last one counts."""
        self.latest.update(metrics)

    def drain(self) -> dict[str, float | None]:
        """The window as one line, which empties it; None where nothing counted in any step."""
        # A reward function that answered None for a whole batch leaves NaN, an extreme over nothing leaves an
        # infinity: they must not poison the rest. A loss that became NaN must be seen, though.
        line: dict[str, float | None] = {
            name: _mean(values, keep_all=name == "loss") for name, values in self.means.items()
        }
        line.update(self.latest)
        self.means, self.latest, self._parts = {}, {}, []
        return line

    def state(self) -> dict[str, Any]:
        """What a checkpoint in the middle of a window must keep."""
        return {"means": self.means, "latest": self.latest, "parts": self._parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a window where a checkpoint left it."""
        self.means, self.latest, self._parts = state["means"], state["latest"], state["parts"]


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, one write a line, so that a reader never sees half a line.

    A value that is not finite, a skipped step's loss for example, is null there: JSON has no NaN, and most readers
    refuse it.
    """

    def __init__(self, output_dir: str, *, active: bool) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self.active = active
        if active and self.path.is_dir():
            raise UserError(f"{self.path} is a directory, where the metrics' file goes; choose another output_dir")
        self._earlier = self.path.stat().st_size if active and self.path.exists() else 0

    def start_afresh(self) -> None:
        """Drops the lines of an earlier run in the same directory; this trainer's own stay."""
        if self.active and self._earlier:
            self.path.write_bytes(self.path.read_bytes()[self._earlier :])
            self._earlier = 0

    def go_on_after(self, step: int, *, logged_step: int) -> None:
        """Drops the lines of steps that are taken again, or told again because they came after `logged_step`."""
        if not (self.active and self.path.exists()):
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = "".join(line for line in lines if _stays(line, step, logged_step))
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(kept)
        unfinished.rename(self.path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes a line at the end of the file."""
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = (json.dumps({name: _in_json(value) for name, value in line.items()}, allow_nan=False) + "\n").encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); make room or choose another output_dir"
            ) from error


def _stays(text: str, step: int, logged_step: int) -> bool:
    """Whether a line is of a run that went no further than `step` and logged its training until `logged_step`."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:  # half a line, of a disk that was full
        return False
    return line["step"] <= (logged_step if "loss" in line else step)


def write_completions(output_dir: str, step: int, table: Mapping[str, list[Any]]) -> Path:
    """prompt, completion, rewards, extras and advantage as completions/completions_{step:05d}.parquet."""
    path = Path(output_dir) / "completions" / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(table.values())))
    columns = {"step": [step] * rows, **{name: _storable(values) for name, values in table.items()}}
    # Not Dataset.to_parquet: its own progress bar would break the training's.
    pq.write_table(Dataset.from_dict(columns).data.table, path)
    return path


def print_completions(step: int, table: Mapping[str, list[Any]], *, limit: int | None) -> None:
    """The completions as a table on the terminal; at most `limit` of them, drawn by the step's own seed."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    rows = range(len(table["prompt"]))
    shown = rows if limit is None or limit >= len(rows) else sorted(random.Random(step).sample(rows, limit))
    view = Table(expand=True, show_lines=True)
    for name in table:
        view.add_column(name)
    for row in shown:
        # Text, not str: a completion may contain what rich would take for markup.
        view.add_row(*(Text(_readable(values[row])) for values in table.values()))
    Console().print(Panel(view, title=f"Step {step}"))


def unique_prompts(table: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The table with the first completion of each prompt only."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(table["prompt"]):
        first.setdefault(repr(prompt), row)
    return {name: [values[row] for row in first.values()] for name, values in table.items()}


def _in_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Iterable[float], *, keep_all: bool) -> float | None:
    kept = [value for value in values if keep_all or math.isfinite(value)]
    return sum(kept) / len(kept) if kept else None


def _readable(value: Any) -> str:
    if isinstance(value, list):  # a conversation
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _storable(values: list[Any]) -> list[Any]:
    """The values as they are when Arrow can hold them in one column, as text otherwise."""
    kinds = {type(value) for value in values if value is not None}
    simple = kinds <= {int, float} or kinds in ({str}, {bool}, {list})
    return values if simple else [None if value is None else str(value) for value in values]
