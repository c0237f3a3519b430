"""What an engine's failure becomes, and the clock that ends one which stalls."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from megalign.parallel.groups import Axis
from megalign.rollout.failing import EngineError, agree_on_failure, failing_after
from megalign.rollout.vllm_engine import _completion
from tests.ranks import run_ranks


def test_whatever_ends_the_block_is_told_with_its_kind_on_one_line() -> None:
    for error, told in ((ValueError("a\n  b"), "ValueError: a b"), (AssertionError(), "AssertionError")):
        with pytest.raises(EngineError) as caught, failing_after(None):
            raise error
        assert str(caught.value) == told and caught.value.__cause__ is error
    with failing_after(None):
        pass


def test_a_block_that_stalls_ends_at_the_limit() -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"^it did not answer within vllm_timeout 0\.2 s$"), failing_after(0.2):
        time.sleep(30)
    assert time.monotonic() - started < 10


def test_code_that_catches_everything_is_ended_all_the_same() -> None:
    caught = []
    with pytest.raises(EngineError, match="vllm_timeout"), failing_after(0.1):
        while True:
            try:
                time.sleep(30)
            except Exception as error:
                caught.append(error)
                if len(caught) == 3:
                    raise


def test_another_alarm_waits_and_comes() -> None:
    came: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: came.append(number))
    earlier = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with failing_after(30):
            time.sleep(0.7)
            assert not came
        time.sleep(0.2)
        assert came == [signal.SIGALRM]
        with failing_after(0.5):
            pass
        time.sleep(0.7)  # no alarm is left behind
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *earlier)


def test_an_alarm_at_the_last_moment_leaves_no_clock_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock = signal.setitimer

    def set_clock_late(which: int, seconds: float, interval: float = 0.0) -> tuple[float, float]:
        if seconds == 0:
            signal.raise_signal(signal.SIGALRM)
        return set_clock(which, seconds, interval)

    handler, earlier = signal.getsignal(signal.SIGALRM), set_clock(signal.ITIMER_REAL, 0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "setitimer", set_clock_late)
            with failing_after(30):
                pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) == handler
    finally:
        signal.signal(signal.SIGALRM, handler)
        set_clock(signal.ITIMER_REAL, *earlier)


def test_in_another_thread_there_is_no_limit() -> None:
    found: list[str] = []

    def run() -> None:
        with failing_after(0.05):
            time.sleep(0.2)
            found.append("done")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["done"]


def told_on_each(causes: list[str | None]) -> str | None:
    """On a rank: what it hears."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    axis = Axis(group=dist.group.WORLD, rank=rank, size=size, ranks=list(range(size)))
    try:
        agree_on_failure(causes[rank], axis)
    except EngineError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("causes", "told"),
    [([None, None], None), ([None, "x"], "on rank 1: x"), (["x", "y"], "on rank 0 and 1 more: x")],
)
def test_one_ranks_failure_is_everybodys(causes: list[str | None], told: str | None) -> None:
    assert run_ranks(2, told_on_each, causes) == [told, told]


@pytest.mark.parametrize(
    ("logprobs", "first"), [([-1.0, math.nan, math.nan], 1), ([math.nan] * 2, 0), ([-1.0, math.nan, -1.0], None)]
)
def test_a_model_that_broke_is_told_of_and_an_unknown_logprob_is_not(logprobs: list[float], first: int | None) -> None:
    steps = [{7: SimpleNamespace(logprob=logprob)} for logprob in logprobs]
    sample = SimpleNamespace(token_ids=[7] * len(steps), logprobs=steps, finish_reason="length")
    output = SimpleNamespace(outputs=[sample], prompt_token_ids=[1])
    if first is None:
        assert len(_completion(3, output, 0).logprobs) == 3
        return
    with pytest.raises(EngineError, match=f"NaN is the logprob of token {first} of completion 3 and of all behind it"):
        _completion(3, output, 0)
