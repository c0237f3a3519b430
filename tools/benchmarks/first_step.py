"""Trains until the end of the first step, and prints where the time since the launch went: a program of its own.

    python -m tools.benchmarks.first_step megalign|trl LAUNCHED OPTIONS      # seconds of the epoch, JSON

Imports nothing before the clock is read.
"""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402
from unittest import mock  # noqa: E402


class Marks(NamedTuple):
    """Seconds, of which all but the first are parts of it."""

    total: float  # from the launch to the end of the first step
    interpreter: float  # until Python runs the program
    imports: float
    loading: float  # the model is built and its weights are read
    step: float  # from the call of train() on


class Loading:
    """Seconds inside the functions that load a model; one that calls another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count."""

        def load(*args: Any, **given: Any) -> Any:
            started = time.time()
            self._depth += 1
            try:
                return function(*args, **given)
            finally:
                self._depth -= 1
                self.seconds += 0.0 if self._depth else time.time() - started

        return load


@contextlib.contextmanager
def watched_loading(engine: str) -> Iterator[Loading]:
    """What the engine calls to have a model."""
    loading = Loading()
    with contextlib.ExitStack() as stack:
        if engine == "megalign":
            from megalign import train_engine

            for home, name in ((train_engine, "build_model"), (train_engine.load, "load_hf")):
                stack.enter_context(mock.patch.object(home, name, loading.timed(getattr(home, name))))
        else:
            from transformers import PreTrainedModel

            load = classmethod(loading.timed(PreTrainedModel.from_pretrained.__func__))
            stack.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", load))
        yield loading


def measure(engine: str, launched: float, options: argparse.Namespace, tell: Callable[[Marks], None]) -> None:
    """Calls `tell` at the end of the first step."""
    from transformers import TrainerCallback

    from megalign import device
    from tools.benchmarks.training import make_trainer, rows_for

    imports = STARTED
    started = 0.0

    class AtTheEndOfTheStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            device.synchronize()
            now = time.time()
            tell(Marks(now - launched, STARTED - launched, imports - STARTED, loading.seconds, now - started))

    with watched_loading(engine) as loading, tempfile.TemporaryDirectory() as scratch:
        _import(engine)
        imports = time.time()
        trainer = make_trainer(engine, options, rows_for(options), AtTheEndOfTheStep(), scratch)
        started = time.time()
        trainer.train()


def _import(engine: str) -> None:
    """The engine's trainer, which packages import when they are asked for it."""
    if engine == "megalign":
        from megalign import SFTConfig, SFTTrainer  # noqa: F401
    else:
        from trl import SFTConfig, SFTTrainer  # noqa: F401


def main() -> None:
    """Prints the marks as its last line."""
    engine, launched, words = sys.argv[1:]
    given = json.loads(words)
    paths = {name: given[name] and Path(given[name]) for name in ("model", "dataset")}
    options = argparse.Namespace(**{**given, **paths})

    def tell(marks: Marks) -> None:
        print(json.dumps(marks._asdict()), flush=True)
        os._exit(0)  # the rest of the run is nobody's concern

    import torch

    torch.set_num_threads(options.threads)
    measure(engine, float(launched), options, tell)


if __name__ == "__main__":
    main()
