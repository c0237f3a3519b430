"""Both conversions beside a plain copy of the same files, and their memory.

The model is made here: random weights of a Llama's shapes in bf16, in files of 5 GB. Each of copy, hf_to_megatron and
megatron_to_hf is a process of its own, one after the other in each repetition, so that a machine that slows down slows
all. Seconds, and CPU seconds, which other programs hardly change, begin when Python and torch are imported; a ratio is
the median over repetitions of the copy's by its own. Memory is the largest RssAnon of /proc/PID/status: what a process
holds besides mapped files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from megalign.checkpoints.hf_stream import Entry, split_into_shards, write_shard
from megalign.conversion.families import architecture_of, rules_of
from megalign.conversion.rules import hf_shapes
from megalign.errors import UserError
from tools.benchmarks import report
from tools.benchmarks.machine import Limits, measure_limits, status_bytes
from tools.benchmarks.models import ROOT, SHAPES

WHATS = ("copy", "hf_to_megatron", "megatron_to_hf")
_COPY = """
target, *files = sys.argv[1:]
for file in files:
    shutil.copyfile(file, target + "/" + file.rpartition("/")[2])
"""
_CONVERT = """
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The last line that a child prints is its own clock's.
_TIMED = """
import atexit, runpy, shutil, sys, time
{imports}
wall, cpu = time.perf_counter(), time.process_time()
atexit.register(lambda: print("\\n", time.perf_counter() - wall, time.process_time() - cpu))
sys.argv = sys.argv[1:]
{work}
"""
_SAMPLE_S = 0.02


class Run(NamedTuple):
    """A process that is over."""

    seconds: float
    cpu_seconds: float
    peak_anon: int  # bytes


def config_of(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, vocabulary: int, *, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """The config.json of a Llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def make_model(path: Path, config: dict[str, Any], max_shard_size: int = 5 * 10**9) -> int:
    """Writes a model of random bits, tensor by tensor; returns its bytes."""
    architecture = architecture_of(config)
    shapes = hf_shapes(rules_of(architecture), architecture)
    block = torch.randint(-(2**15), 2**15, (1 << 22,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))

    def random(name: str) -> list[torch.Tensor]:
        count = math.prod(shapes[name])
        return [block.view(torch.bfloat16)[: min(len(block), count - at)] for at in range(0, count, len(block))]

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    shards = split_into_shards([Entry(name, shape, torch.bfloat16) for name, shape in shapes.items()], max_shard_size)
    weight_map = {}
    for number, entries in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(path / file, entries, random, lambda _: None)
        weight_map.update(dict.fromkeys((entry.name for entry in entries), file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(entry.nbytes for entries in shards for entry in entries)


def watch(command: Sequence[str]) -> Run:
    """A child's seconds, and the largest RssAnon that was seen; its output is shown when it fails."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    peak = 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, text=True)
    while process.poll() is None:
        peak = max(peak, status_bytes(process.pid, "RssAnon"))
        time.sleep(_SAMPLE_S)
    output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])} ended with {process.returncode}: {output}")
    seconds, cpu_seconds = map(float, output.splitlines()[-1].split())
    return Run(seconds, cpu_seconds, peak)


def commands(model: Path, scratch: Path) -> dict[str, list[str]]:
    """What is timed, in this order: the way back starts from what the way there made."""
    files = [str(file) for file in sorted(model.glob("*.safetensors"))]
    copying = _TIMED.format(imports="", work=_COPY)
    converting = _TIMED.format(imports="import megalign.checkpoints.convert", work=_CONVERT)
    tool = [sys.executable, "-c", converting]
    there = [f"{ROOT}/tools/hf_to_megatron.py", "--hf", str(model), "--output", str(scratch / "megatron")]
    back = [f"{ROOT}/tools/megatron_to_hf.py", "--checkpoint", str(scratch / "megatron")]
    return {
        "copy": [sys.executable, "-c", copying, "copy", str(scratch / "copy"), *files],
        "hf_to_megatron": [*tool, *there],
        "megatron_to_hf": [*tool, *back, "--output", str(scratch / "hf")],
    }


def measure(model: Path, repetitions: int, console: Console) -> tuple[dict[str, list[Run]], list[Limits]]:
    """The runs of each, and the machine's limits after each round.

    What they write is removed at once, but for what the next one reads.
    """
    found: dict[str, list[Run]] = {what: [] for what in WHATS}
    limits = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
            (Path(scratch) / "copy").mkdir()
            for what, command in commands(model, Path(scratch)).items():
                found[what].append(watch(command))
                own = found[what][-1]
                console.print(f"[dim]{what}: {own.seconds:.1f} s, of CPU {own.cpu_seconds:.1f} s")
                if what == "copy":
                    shutil.rmtree(Path(scratch) / "copy")
        limits.append(measure_limits("bfloat16"))
    return found, limits


def summarize(found: dict[str, list[Run]], nbytes: int, shape: str) -> list[dict[str, Any]]:
    """One entry each; a ratio of 0.5 is half the copy's speed."""
    entries = []
    for what, runs in found.items():
        pairs = list(zip(found["copy"], runs, strict=True))
        median = statistics.median(own.seconds for own in runs)
        entries.append(
            {
                "job": "convert",
                "what": what,
                "shape": shape,
                "bytes": nbytes,
                "median_s": median,
                "seconds": [own.seconds for own in runs],
                "gb_per_s": nbytes / 1e9 / median,
                "ratio": statistics.median(copy.seconds / own.seconds for copy, own in pairs),
                "cpu_ratio": statistics.median(copy.cpu_seconds / own.cpu_seconds for copy, own in pairs),
                "peak_anon": max(own.peak_anon for own in runs),
            }
        )
    return entries


def run(options: argparse.Namespace) -> None:
    """Measures, shows, writes."""
    console = report.console()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        model = Path(directory) / "model"
        nbytes = make_model(model, config_of(*SHAPES[options.shape]))
        found, limits = measure(model, options.repetitions, console)
    shown = report.Report(
        title=f"convert: Llama {options.shape}, {nbytes / 1e9:.1f} GB, medians of {options.repetitions}",
        entries=summarize(found, nbytes, options.shape),
        columns={
            "what": lambda entry: entry["what"],
            "s": lambda entry: f"{entry['median_s']:.1f}",
            "GB/s": lambda entry: f"{entry['gb_per_s']:.2f}",
            "x copy": lambda entry: f"{entry['ratio']:.2f}",
            "by CPU s": lambda entry: f"{entry['cpu_ratio']:.2f}",
            "RssAnon GB": lambda entry: f"{entry['peak_anon'] / 1e9:.2f}",
        },
        limits=limits,
    )
    report.finish(shown, options, console)
