"""`awake`: who holds memory when."""

from __future__ import annotations

import pytest

from megalign.rollout.engine import awake


class Recorder:
    """Writes down what an engine is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def wake(self, *tags: str) -> None:
        self.told.append(("wake", *tags))

    def sleep(self) -> None:
        self.told.append("sleep")


def test_an_engine_sleeps_after_its_block() -> None:
    engine = Recorder()
    with awake(engine) as inside:
        assert inside is engine and engine.told == [("wake",)]
    assert engine.told == [("wake",), "sleep"]


def test_synchronised_weights_survive_until_the_next_block() -> None:
    engine = Recorder()
    with awake(engine, "weights"):
        pass
    assert engine.told == [("wake", "weights")]


def test_an_error_is_not_followed_by_a_second_one() -> None:
    engine = Recorder()
    with pytest.raises(RuntimeError), awake(engine):
        raise RuntimeError
    assert engine.told == [("wake",)]
