"""Where the time of an optimizer step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Seconds by name, which add up to the step: a block inside another one is not counted in both."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = self._started = time.perf_counter()

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

    def end_step(self) -> dict[str, float]:
        """perf/<name>_s of each, perf/other_s of what is left, and step_time, their sum."""
        self._credit()
        whole = self._since - self._started
        parts = {f"perf/{name}_s": seconds for name, seconds in self._seconds.items()}
        return {**parts, "perf/other_s": whole - sum(parts.values()), "step_time": whole}

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
