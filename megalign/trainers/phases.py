"""Where the time of an optimizer step goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Phases:
    """Seconds by name, which add up to the step: a block inside another one is not counted in both."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = self._started = time.perf_counter()
        self._ended: float | None = None
        self._between = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The block's seconds."""
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def begin_step(self) -> None:
        """Forgets what was before; the names stay, since a step without sampling spent no time in it."""
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._since = self._started = time.perf_counter()
        self._between = 0.0 if self._ended is None else self._started - self._ended

    @property
    def names(self) -> list[str]:
        """Of all blocks so far."""
        return list(self._seconds)

    def restore(self, names: Iterable[str]) -> None:
        """Those that a run had before it was stopped: its next step may be without some of them."""
        self._seconds = dict.fromkeys(names, 0.0)

    def end_step(self) -> dict[str, float]:
        """perf/<name>_s of each, perf/other_s of the rest, and step_time, their sum; perf/between_steps_s before it."""
        self._credit()
        whole, self._ended = self._since - self._started, self._since
        parts = {f"perf/{name}_s": seconds for name, seconds in self._seconds.items()}
        parts["perf/other_s"] = whole - sum(parts.values())
        return {**parts, "step_time": whole, "perf/between_steps_s": self._between}

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
