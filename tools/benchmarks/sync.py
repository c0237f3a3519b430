"""The trained weights into vLLM in the same process, beside a plain copy of the same bytes.

One rank. Memory is measured in a pass that is not timed: what is held for a while beyond both engines.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalign import device
from megalign.config import GRPOConfig
from megalign.parallel.groups import end_distributed, initialize
from megalign.resharding.sync import sync_weights
from megalign.train_engine import TrainEngine
from tools.benchmarks import machine, report
from tools.benchmarks.engines import Worker, asked, stopped_at_the_end, take_turns
from tools.benchmarks.models import found_model

WAYS = ("into vLLM", "copy")


class Answer(NamedTuple):
    """One transfer each way, one right after the other."""

    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    nbytes: int
    extra_bytes: dict[str, int]


class Transfers:
    """The ways, of one engine."""

    def __init__(self, policy: TrainEngine, rollout: Any) -> None:
        sync_weights(policy, rollout)
        self._sources = [tensor for _, tensor in policy.gathered()]
        self._targets = [torch.empty_like(tensor) for tensor in self._sources]
        self._ways: Mapping[str, Callable[[], None]] = {
            WAYS[0]: lambda: sync_weights(policy, rollout),
            WAYS[1]: lambda: _copy(self._targets, self._sources),
        }
        self._ways[WAYS[1]]()  # the targets' memory is touched
        self._extra: dict[str, int] = {}
        for way, transfer in self._ways.items():
            with machine.PeakMemory() as peak:
                transfer()
            self._extra[way] = peak.extra

    def once(self) -> Answer:
        """Each way."""
        seconds, cpu_seconds = {}, {}
        for way, transfer in self._ways.items():
            started = time.perf_counter(), time.process_time()
            transfer()
            device.synchronize()
            seconds[way], cpu_seconds[way] = time.perf_counter() - started[0], time.process_time() - started[1]
        return Answer(seconds, cpu_seconds, sum(tensor.nbytes for tensor in self._sources), self._extra)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def work(pipe: Connection, options: argparse.Namespace, scratch: str) -> None:
    """The process with both engines."""
    from megalign.rollout.vllm_engine import VllmEngine

    torch.set_num_threads(options.threads)
    args = GRPOConfig(output_dir=scratch, bf16=options.dtype == "bfloat16", vllm_cpu_kv_cache_gib=options.kv_cache_gib)
    groups = initialize(args)
    rollout = VllmEngine(str(options.model), args, groups)
    transfers = Transfers(TrainEngine(str(options.model), args, groups), rollout)
    for _ in asked(pipe):
        pipe.send(transfers.once())
    end_distributed()


def summarize(answers: Sequence[Answer]) -> list[report.Entry]:
    """One entry a way; its ratio is the copy's seconds by its own: 0.5 is half the copy's speed."""
    entries = []
    for way in WAYS:
        seconds = [answer.seconds[way] for answer in answers]
        nbytes = answers[0].nbytes
        entries.append(
            {
                "job": "sync",
                "what": way,
                "bytes": nbytes,
                "median_s": statistics.median(seconds),
                "seconds": seconds,
                "cpu_s": statistics.median(answer.cpu_seconds[way] for answer in answers),
                "gb_per_s": nbytes / 1e9 / statistics.median(seconds),
                "ratio": report.median_ratio([answer.seconds[WAYS[1]] for answer in answers], seconds),
                "extra_bytes": answers[0].extra_bytes[way],
            }
        )
    return entries


def run(options: argparse.Namespace) -> None:
    """Measures, shows, writes."""
    options.model = found_model(options.model)
    torch.set_num_threads(options.threads)
    console = report.console()
    with tempfile.TemporaryDirectory() as scratch, stopped_at_the_end() as keep:
        workers = [keep(Worker("vllm", scratch, work, options, scratch))]
        answers, limits = take_turns(
            workers,
            options.repetitions,
            options.dtype,
            console,
            lambda answer: "  ".join(f"{way} {seconds:.3f} s" for way, seconds in answer.seconds.items()),
        )
    entries = summarize(answers[0])
    shown = report.Report(
        title=f"sync: {options.model.name}, {entries[0]['bytes'] / 1e9:.2f} GB, {options.dtype}, "
        f"medians of {options.repetitions}",
        entries=entries,
        columns={
            "what": lambda entry: entry["what"],
            "s": lambda entry: f"{entry['median_s']:.3f}",
            "CPU s": lambda entry: f"{entry['cpu_s']:.3f}",
            "GB/s": lambda entry: f"{entry['gb_per_s']:.2f}",
            "x copy": lambda entry: f"{entry['ratio']:.2f}",
            "extra MB": lambda entry: f"{entry['extra_bytes'] / 1e6:.0f}",
        },
        limits=limits,
    )
    report.finish(shown, options, console)
