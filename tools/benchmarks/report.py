"""What was measured: as a list in a JSON file, as a table, as a picture."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.benchmarks import machine

Entry = dict[str, Any]
_FILE_WIDTH = 160


@dataclass(frozen=True)
class Report:
    """The entries of a job, and how they are shown."""

    title: str
    entries: list[Entry]
    columns: Mapping[str, Callable[[Entry], str]]  # by heading; the first says what an entry is of
    limits: Sequence[machine.Limits]
    bars: str = "seconds"  # an entry's list of numbers that the picture shows
    unit: str = "s"
    expected: str | None = None  # an entry's number that they are held against, None where there is none


def console() -> Console:
    """Where a job tells how far it is, and then shows its table; a file has room for all columns."""
    found = Console()
    return found if found.is_terminal else Console(width=_FILE_WIDTH)


def median_ratio(peer: Sequence[float], own: Sequence[float]) -> float:
    """The median over pairs, not the ratio of medians: a machine that slows down slows both of a pair."""
    return statistics.median(theirs / ours for theirs, ours in zip(peer, own, strict=True))


def finish(report: Report, options: argparse.Namespace, console: Console) -> None:
    """Writes the JSON and the picture, where they were asked for, and shows the table."""
    limits = machine.median_limits(report.limits)
    made_on = {**machine.describe(options.threads), **limits._asdict()}
    entries = [{**entry, "options": vars(options), "machine": made_on} for entry in report.entries]
    if options.json is not None:
        options.json.write_text(json.dumps(entries, indent=2, default=str) + "\n")
    if options.plot is not None:
        plot(report, made_on["name"], options.plot)
    show(report, made_on, console)


def show(report: Report, made_on: Mapping[str, Any], console: Console) -> None:
    """The entries as a table, with the machine's own limits below."""
    table = Table(title=report.title)
    for place, heading in enumerate(report.columns):
        table.add_column(heading, justify="right" if place else "left", no_wrap=not place, overflow="fold")
    for entry in report.entries:
        table.add_row(*(text(entry) for text in report.columns.values()))
    console.print(table)
    rates = {
        "GFLOP/s in a matrix product": [limit.flops for limit in report.limits],
        "in fp32": [limit.flops_fp32 for limit in report.limits],
        "GB/s in a copy": [limit.copied for limit in report.limits],
    }
    texts = [f"{_giga(statistics.median(found))} {of} {_range(found)}" for of, found in rates.items()]
    console.print(f"machine: {', '.join(texts)}", soft_wrap=True)
    if any(max(found) > 1.3 * min(found) for found in rates.values()):
        console.print("[yellow]other programs kept the machine busy: trust CPU seconds more than the others")
    built = "with csrc/" if made_on["extension"] else "without csrc/"
    versions = ", ".join(f"{name} {version}" for name, version in made_on["versions"].items())
    console.print(f"{made_on['name']}, {made_on['threads']} threads, {built}; {versions}", soft_wrap=True)


def _giga(value: float) -> str:
    return f"{value / 1e9:.0f}"


def _range(values: Sequence[float]) -> str:
    return f"({_giga(min(values))} to {_giga(max(values))})"


def plot(report: Report, made_on: str, path: Path) -> None:
    """A bar of the median for each entry, the single measurements as dots on it."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # no pyplot: no window system is asked for

    label = next(iter(report.columns.values()))
    names, colors = [label(entry) for entry in report.entries], rcParams["axes.prop_cycle"].by_key()["color"]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{report.unit}, medians and single values; {made_on}")
    figure.suptitle(report.title, fontsize="medium", wrap=True)
    for place, entry in enumerate(report.entries):
        values = entry[report.bars]
        own = entry.get("engine", "megalign") == "megalign"
        axes.barh(place, statistics.median(values), color=colors[0] if own else colors[7], height=0.6)
        axes.plot(values, [place] * len(values), ".", color="black", markersize=5)
        if report.expected is not None and entry[report.expected] is not None:
            axes.plot([entry[report.expected]] * 2, [place - 0.4, place + 0.4], color=colors[3], linewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
