"""How long a checkpoint holds training up: written by the ranks, and by processes beside them (async_save).

One rank in this process, AdamW's state and weights of the model; ways and repetitions alternate. `held` is the time for
which no step can be taken, `written` the time until the checkpoint is on the disk, `step` a step's beside nothing, or
beside the writing. Medians over repetitions.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalign.algos.supervised import sft_loss
from megalign.config import SFTConfig
from megalign.data.collate import pack
from megalign.parallel.groups import end_distributed, initialize
from megalign.train_engine import TrainEngine
from tools.benchmarks import machine, report
from tools.benchmarks.models import found_model

WAYS = ("the rank", "processes beside it")


def measure(engine: TrainEngine, directory: Path, way: str) -> dict[str, float]:
    """One checkpoint; seconds by what they are of."""

    def step() -> float:
        started = time.perf_counter()
        engine.train_step([batch], sft_loss, learning_rate=1e-6)
        return time.perf_counter() - started

    draw = torch.Generator().manual_seed(0)
    batch = pack([{"tokens": torch.randint(engine.architecture.vocab_size, (128,), generator=draw)}])
    path = directory / "checkpoint"
    alone = step()
    started = time.perf_counter()
    if way == WAYS[0]:
        engine.save(str(path))
        held = written = time.perf_counter() - started
        beside = step()
    else:
        saving = engine.begin_save(str(path))
        held = time.perf_counter() - started
        steps = []
        while saving.finish(wait=False) is None:
            steps.append(step())
        written, beside = time.perf_counter() - started, statistics.median(steps or [step()])
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return {"held": held, "written": written, "step": alone, "step beside": beside, "GB": nbytes / 1e9}


def summarize(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[report.Entry]:
    """One entry a way; its ratio is the seconds that the rank's own writing held up, by its own."""
    held = {way: [run["held"] for run in found[way]] for way in WAYS}
    return [
        {
            "job": "save",
            "what": way,
            **{name: statistics.median(run[name] for run in found[way]) for name in found[way][0]},
            "median_s": statistics.median(held[way]),
            "seconds": held[way],
            "ratio": report.median_ratio(held[WAYS[0]], held[way]),
        }
        for way in WAYS
    ]


def run(options: argparse.Namespace) -> None:
    """Measures, shows, writes."""
    options.model = found_model(options.model)
    torch.set_num_threads(options.threads)
    args = SFTConfig(output_dir="unused", bf16=False)
    engine = TrainEngine(str(options.model), args, initialize(args))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    limits, console = [], report.console()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        measure(engine, Path(directory), WAYS[0])  # warm-up
        for number in range(1, options.repetitions + 1):
            for way in WAYS:
                found[way].append(measure(engine, Path(directory), way))
            limits.append(machine.measure_limits("float32"))
            told = "  ".join(f"{way}: held {runs[-1]['held']:.2f} s" for way, runs in found.items())
            console.print(f"[dim]{number}/{options.repetitions}  {told}")

    def seconds(name: str) -> Any:
        return lambda entry: f"{entry[name]:.2f}"

    shown = report.Report(
        title=f"save: {options.model.name}, medians of {options.repetitions}",
        entries=summarize(found),
        columns={
            "by": lambda entry: entry["what"],
            **{name: seconds(name) for name in ("held", "written", "step", "step beside", "GB")},
            "x held": seconds("ratio"),
        },
        limits=limits,
    )
    report.finish(shown, options, console)
    end_distributed()
