"""Requests to stop in good order: SIGTERM, SIGUSR1, or a file STOP in output_dir. Heard by one rank, heeded by all.

A request only sets a flag, which travels with the vote that ends each step (Run.agree): no collective of its own.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

SIGNALS = ("SIGTERM", "SIGUSR1")
FILE = "STOP"
CAUSES = (*SIGNALS, FILE)


class Stopping:
    """What this rank has heard, and what all ranks have agreed to."""

    def __init__(self, output_dir: str, *, is_first: bool) -> None:
        self._file, self._is_first = Path(output_dir) / FILE, is_first
        self._heard: set[str] = set()
        self.cause: str | None = None  # once all ranks know

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block the two signals no longer end the process. Handlers of a launcher's own come back."""
        self._heard, self.cause = set(), None
        if threading.current_thread() is not threading.main_thread():  # Python sets handlers in no other
            yield
            return
        before = {name: signal.signal(getattr(signal, name), self._hear) for name in SIGNALS}
        try:
            yield
        finally:
            for name, handler in before.items():
                # One that was not set from Python cannot be set back.
                signal.signal(getattr(signal, name), signal.SIG_DFL if handler is None else handler)

    def asked(self) -> list[bool]:
        """Of each of CAUSES, whether this rank has heard it; the first rank looks for the file."""
        found = self._is_first and self._file.exists()
        return [*(name in self._heard for name in SIGNALS), found]

    def heed(self, agreed: Sequence[bool]) -> bool:
        """Takes what any rank has heard; whether it is a request. The file must not stop the next start as well."""
        causes = [name for name, heard in zip(CAUSES, agreed, strict=True) if heard]
        if causes:
            self.cause = " and ".join(causes)
        if FILE in causes and self._is_first:
            self._file.unlink(missing_ok=True)
        return bool(causes)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard.add(signal.Signals(number).name)
