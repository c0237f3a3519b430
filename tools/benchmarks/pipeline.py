"""How long ranks of a pipeline wait, and what CPU their work takes beside one rank's.

For real: a small model over two ranks, in turns with one rank that has the same microbatches. And with layers that
sleep instead of computing, so that two cores carry any number of ranks. The idle share of a step is what its ranks did
not spend inside forward and backward passes, of the time from the first pass's start to the last one's end. The
schedules promise (p - 1) / (v m + p - 1) for p stages of v chunks and m microbatches (arXiv 2104.04473, section 2.2,
says (p - 1) / (v m) of the time that is busy).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megalign.algos.supervised import sft_loss
from megalign.batch import Batch
from megalign.config import SFTConfig
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_files import read_config
from megalign.data.collate import pack
from megalign.errors import UserError
from megalign.launch import hold_port
from megalign.parallel.groups import end_distributed, initialize
from megalign.train_engine import TrainEngine
from tools.benchmarks import machine, report
from tools.benchmarks.engines import Worker, asked, stopped_at_the_end

VOCAB = 256  # a head that weighs little beside a layer: the stages are of one size


class Layout(NamedTuple):
    """Stages, each of some chunks of the model; of layers that compute, or that sleep."""

    stages: int
    chunks: int = 1
    sleeps: bool = False

    @classmethod
    def named(cls, name: str) -> Layout:
        """Of pp4xvpp2 and the like, with layers that sleep."""
        stages, _, chunks = name.removeprefix("pp").partition("xvpp")
        return cls(int(stages), int(chunks or 1), sleeps=True)

    @property
    def name(self) -> str:
        """With what its layers do."""
        chunks = f"xVPP{self.chunks}" if self.chunks > 1 else ""
        pipeline = f"PP{self.stages}{chunks}" if self.stages > 1 else "one rank"
        return f"{pipeline}, layers {'sleep' if self.sleeps else 'compute'}"

    def idle_share(self, microbatches: int) -> float:
        """What the schedule promises."""
        waits = self.stages - 1
        return waits / (self.chunks * microbatches + waits)


class Work(NamedTuple):
    """A rank's step."""

    started: float  # when its first pass began and its last one ended; one clock for all processes
    ended: float
    busy: float  # seconds inside passes
    cpu_seconds: float  # of the whole step and all threads


class Step(NamedTuple):
    """A step of all ranks."""

    seconds: float
    idle: float
    cpu_seconds: float

    @classmethod
    def of(cls, ranks: Sequence[Work]) -> Step:
        """From the first pass of any to the last."""
        seconds = max(rank.ended for rank in ranks) - min(rank.started for rank in ranks)
        busy = sum(rank.busy for rank in ranks) / len(ranks)
        return cls(seconds, 1 - busy / seconds, sum(rank.cpu_seconds for rank in ranks))


# ---- a rank


class Sleep(torch.autograd.Function):
    """The identity, which takes its time: `seconds` forward, twice that backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, seconds: float) -> Tensor:
        """Sleeps."""
        ctx.seconds = seconds
        time.sleep(seconds)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sleeps longer."""
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Passes:
    """When the passes of a step were."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Before a step."""
        self.found: list[tuple[float, float]] = []

    @property
    def busy(self) -> float:
        """Seconds inside them."""
        return sum(end - start for start, end in self.found)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each of whose calls is a pass."""

        def run_pass(*args: Any, **given: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **given)
            self.found.append((started, time.perf_counter()))
            return result

        return run_pass


@contextmanager
def watched() -> Iterator[Passes]:
    """The passes of Megatron's schedules, which call these two functions by their names."""
    from megatron.core.pipeline_parallel import schedules  # its known warnings are silent by now

    passes = Passes()
    both = {name: passes.timed(getattr(schedules, name)) for name in ("forward_step", "backward_step")}
    with mock.patch.multiple(schedules, **both):
        yield passes


def put_to_sleep(engine: TrainEngine, seconds: float) -> None:
    """Layers that hand on what they are given, later."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return Sleep.apply(hidden_states, seconds), None

    for model in engine._models:
        for layer in model.decoder.layers:
            layer.forward = forward


def microbatches(options: argparse.Namespace, vocab_size: int) -> list[Batch]:
    """Sequences of one length: the same work in each."""
    draw = torch.Generator().manual_seed(0)
    shape = (options.microbatches, options.tokens)
    return [pack([{"tokens": tokens}]) for tokens in torch.randint(3, vocab_size, shape, generator=draw)]


def work(pipe: Connection, layout: Layout, model: str, options: argparse.Namespace) -> None:
    """A rank's process."""
    torch.set_num_threads(options.threads)
    args = SFTConfig(
        output_dir="unused",
        bf16=False,
        gradient_checkpointing=False,
        pipeline_model_parallel_size=layout.stages,
        virtual_pipeline_model_parallel_size=layout.chunks,
    )
    engine = TrainEngine(model, args, initialize(args))
    if layout.sleeps:
        put_to_sleep(engine, options.sleep_ms / 1e3)
    batches = microbatches(options, engine.architecture.vocab_size)
    with watched() as passes:
        for _ in asked(pipe):
            passes.forget()
            dist.barrier()
            cpu = time.process_time()
            engine.train_step(batches, sft_loss, learning_rate=1e-6)
            cpu_seconds = time.process_time() - cpu
            pipe.send(Work(passes.found[0][0], passes.found[-1][1], passes.busy, cpu_seconds))
    end_distributed()


# ---- all of them


def save_model(path: Path, layers: int = 8) -> Path:
    """A llama whose layers take some milliseconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class Fleet:
    """The ranks of a layout; on CPUs unless there is a GPU for each."""

    def __init__(
        self, layout: Layout, model: Path, options: argparse.Namespace, scratch: str, keep: Callable[[Worker], Worker]
    ) -> None:
        self.layout, self._ranks, self._port = layout, [], hold_port()
        for rank in range(layout.stages):
            environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.stages, "LOCAL_WORLD_SIZE": layout.stages}
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port.getsockname()[1]}
            if not options.on_cuda:
                environ["CUDA_VISIBLE_DEVICES"] = ""
            texts = {name: str(value) for name, value in environ.items()}
            name = f"rank {rank} of {layout.name}"
            self._ranks.append(keep(Worker(name, scratch, work, layout, str(model), options, environ=texts)))

    def step(self) -> Step:
        """Of all ranks."""
        for rank in self._ranks:
            rank.ask()
        return Step.of([rank.answer() for rank in self._ranks])


def summarize(layout: Layout, steps: Sequence[Step], alone: Sequence[Step] | None, num: int) -> report.Entry:
    """The entry of a layout; `cpu_ratio` is its CPU seconds by those of one rank, `alone`, for the same work."""
    promised = layout.idle_share(num)
    idle = statistics.median(step.idle for step in steps)
    return {
        "job": "pipeline",
        "layout": layout.name,
        "stages": layout.stages,
        "chunks": layout.chunks,
        "microbatches": num,
        "median_s": statistics.median(step.seconds for step in steps),
        "seconds": [step.seconds for step in steps],
        "idle": idle,
        "idles": [step.idle for step in steps],
        "promised_idle": promised if promised else None,
        "idle_ratio": idle / promised if promised else None,
        "cpu_s": statistics.median(step.cpu_seconds for step in steps),
        "cpu_ratio": alone
        and report.median_ratio([step.cpu_seconds for step in steps], [step.cpu_seconds for step in alone]),
    }


def in_turns(
    layouts: Sequence[Layout], model: Path, options: argparse.Namespace, console: Console
) -> tuple[list[list[Step]], list[machine.Limits]]:
    """(steps of each layout, the machine's limits after each round); they take turns."""
    found: list[list[Step]] = [[] for _ in layouts]
    limits = []
    with tempfile.TemporaryDirectory() as scratch, stopped_at_the_end() as keep:
        fleets = [Fleet(layout, model, options, scratch, keep) for layout in layouts]
        for fleet in fleets:
            console.print(f"[dim]{fleet.layout.name}: warm-up")
            fleet.step()
        for number in range(1, options.repetitions + 1):
            for steps, fleet in zip(found, fleets, strict=True):
                steps.append(fleet.step())
            limits.append(machine.measure_limits("float32"))
            told = (
                f"{fleet.layout.name}: {steps[-1].idle:.1%} idle" for steps, fleet in zip(found, fleets, strict=True)
            )
            console.print(f"[dim]{number}/{options.repetitions}  {'  '.join(told)}")
    return found, limits


def check(layouts: Sequence[Layout], model: Path, options: argparse.Namespace) -> None:
    """That the layers divide, and Megatron's interleaved schedule has whole rounds of microbatches."""
    layers = architecture_of(read_config(str(model))).num_layers
    for layout in layouts:
        if layers % (layout.stages * layout.chunks):
            raise UserError(f"{layers} layers of {model} do not divide by {layout.name}; give another --model")
        if layout.chunks > 1 and options.microbatches % layout.stages:
            raise UserError(
                f"--microbatches {options.microbatches} must be a multiple of {layout.stages} for {layout.name}"
            )


def run(options: argparse.Namespace) -> None:
    """Measures, shows, writes."""
    torch.set_num_threads(options.threads)
    console = report.console()
    asleep = [Layout.named(name) for name in options.layouts]
    alone, real = Layout(1), Layout(2)
    options.on_cuda = torch.cuda.device_count() >= max(layout.stages for layout in [real, *asleep])
    options.threads = 1  # of each rank, so that one rank's work and two ranks' are alike
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        small = save_model(Path(directory))
        model = options.model or small
        check([alone, real], model, options)
        check(asleep, small, options)
        (by_one, by_two), limits = in_turns([alone, real], model, options, console)
        num = options.microbatches
        entries = [summarize(alone, by_one, None, num), summarize(real, by_two, by_one, num)]
        for layout in asleep:  # alone: they are held against what the schedule promises
            (steps,), beside = in_turns([layout], small, options, console)
            entries.append(summarize(layout, steps, None, num))
            limits += beside
    shown = report.Report(
        title=f"pipeline: {num} microbatches of {options.tokens} tokens, layers that sleep {options.sleep_ms:g} ms, "
        f"medians of {options.repetitions}, {'GPUs' if options.on_cuda else 'CPUs'}",
        entries=entries,
        columns={
            "layout": lambda entry: entry["layout"],
            "s": lambda entry: f"{entry['median_s']:.3f}",
            "idle": lambda entry: f"{entry['idle']:.1%}",
            "promised": lambda entry: "-" if entry["promised_idle"] is None else f"{entry['promised_idle']:.1%}",
            "ratio": lambda entry: "-" if entry["idle_ratio"] is None else f"{entry['idle_ratio']:.2f}",
            "CPU s": lambda entry: f"{entry['cpu_s']:.2f}",
            "x one rank's": lambda entry: "-" if entry["cpu_ratio"] is None else f"{entry['cpu_ratio']:.2f}",
        },
        limits=limits,
        bars="idles",
        unit="idle share",
        expected="promised_idle",
    )
    report.finish(shown, options, console)
