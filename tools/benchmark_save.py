"""How long a checkpoint holds training up: written by the ranks, and by processes beside them (async_save).

    python tools/benchmark.py save --json FILE [--model DIR] [--repetitions 3] [--directory DIR]

One rank in this process, AdamW's state and weights of the model; ways and repetitions alternate. `held` is the time for
which no step can be taken, `written` the time until the checkpoint is on the disk, `step` a step's beside nothing, or
beside the writing. Medians over repetitions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megalign.algos.supervised import sft_loss
from megalign.config import SFTConfig
from megalign.data.collate import pack
from megalign.parallel.groups import end_distributed, initialize
from megalign.train_engine import TrainEngine

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("by the rank", "beside it")


def measure(engine: TrainEngine, directory: Path, way: str) -> dict[str, float]:
    """One checkpoint; seconds by what they are of."""

    def step() -> float:
        started = time.perf_counter()
        engine.train_step([batch], sft_loss, learning_rate=1e-6)
        return time.perf_counter() - started

    draw = torch.Generator().manual_seed(0)
    batch = pack([{"tokens": torch.randint(10, 1000, (128,), generator=draw)}])
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "quickstart/smollm2", help="Hugging Face directory")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where checkpoints go; the system's temporary one if not given")
    options = parser.parse_args(arguments)
    args = SFTConfig(output_dir="unused", bf16=False)
    engine = TrainEngine(str(options.model), args, initialize(args))
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        measure(engine, Path(directory), WAYS[0])  # warm-up
        for _ in range(options.repetitions):
            for way in WAYS:
                results[way].append(measure(engine, Path(directory), way))
    medians: dict[str, Any] = {
        way: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for way, runs in results.items()
    }
    options.json.write_text(json.dumps({"medians": medians, "runs": results}, indent=1))
    table = Table("written", *next(iter(medians.values())))
    for way, values in medians.items():
        table.add_row(way, *(f"{value:.2f}" for value in values.values()))
    Console().print(table)
    end_distributed()


if __name__ == "__main__":
    main()
