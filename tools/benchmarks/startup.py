"""Seconds until --help is there, and from the launch to the end of the first SFT step, beside TRL's.

Each is a process of its own, one after the other. Of the first step, the loading of the model is told apart: it grows
with the model, the rest does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megalign.errors import UserError
from tools.benchmarks import machine, report
from tools.benchmarks.models import ROOT, found_model

ENGINES = ("megalign", "trl")
HELP, FIRST_STEP = "--help", "first step"
_HELP = {
    "megalign": [sys.executable, "-m", "megalign", "--help"],
    "trl": [sys.executable, "-c", "from trl.cli import main; main()", "--help"],
}


def seconds_of_help(engine: str) -> dict[str, float]:
    """A process from start to end."""
    started = time.perf_counter()
    _output(_HELP[engine])
    return {"total": time.perf_counter() - started}


def marks_of_first_step(engine: str, options: argparse.Namespace) -> dict[str, float]:
    """A process up to the end of the first step, and its parts."""
    words = json.dumps({**vars(options), "job": "sft"}, default=str)
    program = [sys.executable, "-m", "tools.benchmarks.first_step", engine, str(time.time()), words]
    return json.loads(_output(program).splitlines()[-1])


def _output(command: Sequence[str]) -> str:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"{' '.join(command[:4])} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout


def summarize(what: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[report.Entry]:
    """One entry an engine; its ratio is TRL's seconds by its own, `besides_loading_s` the time without the model's."""
    totals = {engine: [one["total"] for one in found[engine]] for engine in ENGINES}
    entries = []
    for engine in ENGINES:
        parts: dict[str, Any] = {f"{name}_s": None for name in ("imports", "loading", "besides_loading", "step")}
        if what == FIRST_STEP:
            for name in ("imports", "loading", "step"):
                parts[f"{name}_s"] = statistics.median(one[name] for one in found[engine])
            parts["besides_loading_s"] = statistics.median(one["total"] - one["loading"] for one in found[engine])
        entries.append(
            {
                "job": "startup",
                "what": what,
                "engine": engine,
                "median_s": statistics.median(totals[engine]),
                "seconds": totals[engine],
                "ratio": report.median_ratio(totals["trl"], totals[engine]),
                **parts,
            }
        )
    return entries


def run(options: argparse.Namespace) -> None:
    """Measures, shows, writes."""
    options.model = found_model(options.model)
    console, limits = report.console(), []
    ways = {HELP: seconds_of_help, FIRST_STEP: lambda engine: marks_of_first_step(engine, options)}
    found: dict[str, dict[str, list[dict[str, float]]]] = {what: {engine: [] for engine in ENGINES} for what in ways}
    for number in range(options.repetitions + 1):
        for what, measure in ways.items():
            for engine in ENGINES:
                one = measure(engine)
                console.print(f"[dim]{number}/{options.repetitions}  {what}, {engine}: {one['total']:.2f} s")
                if number:  # the first of each reads its files from the disk
                    found[what][engine].append(one)
        limits.append(machine.measure_limits(options.dtype))
    entries = [entry for what in ways for entry in summarize(what, found[what])]

    def part(name: str) -> Any:
        return lambda entry: "-" if entry[name] is None else f"{entry[name]:.2f}"

    shown = report.Report(
        title=f"startup: seconds from the launch, {options.model.name}, {options.dtype}, SFT, {options.batch} rows, "
        f"medians of {options.repetitions}",
        entries=entries,
        columns={
            "what": lambda entry: f"{entry['what']}: {entry['engine']}",
            "s": part("median_s"),
            "x TRL": part("ratio"),
            "imports": part("imports_s"),
            "loading": part("loading_s"),
            "besides loading": part("besides_loading_s"),
            "step": part("step_s"),
        },
        limits=limits,
    )
    report.finish(shown, options, console)
