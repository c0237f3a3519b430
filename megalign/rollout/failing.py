"""An engine that fails while it samples: what that is, how long it may take, and that all ranks hear of it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from megalign.parallel.control import gather_objects
from megalign.parallel.groups import Axis


class EngineError(Exception):
    """Sampling ended without completions, by no mistake of the user's; a fresh engine may do better."""


@contextlib.contextmanager
def failing_after(seconds: float | None) -> Iterator[None]:
    """Whatever ends the block is an EngineError with the cause, and so is a block that takes longer than this.

    The clock is a signal, which Python hears in its main thread and between two of its own steps: a collective or a
    kernel that never returns is not interrupted. In another thread there is no limit.
    """
    try:
        with _alarm(seconds):
            yield
    except EngineError:
        raise
    except Exception as error:  # an engine's errors are of any kind, and each must reach every rank, or they hang
        told = " ".join(str(error).split())
        raise EngineError(f"{type(error).__name__}: {told}" if told else type(error).__name__) from error


@contextlib.contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    is_over = False

    def stop(*_: object) -> None:
        if not is_over:
            raise EngineError(f"it did not answer within vllm_timeout {seconds:g} s")

    handler, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    # Again and again: code that catches everything would go on after the first.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        is_over = True  # first: an alarm that came before the next line is done would leave the clock running
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm, which has waited
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def agree_on_failure(mine: str | None, world: Axis) -> None:
    """EngineError on every rank when the engine of any failed; `mine` is this rank's cause. Collective."""
    told = {rank: cause for rank, cause in enumerate(gather_objects(mine, world)) if cause is not None}
    if told:
        first = min(told)
        others = f" and {len(told) - 1} more" if len(told) > 1 else ""
        raise EngineError(f"on rank {first}{others}: {told[first]}")
