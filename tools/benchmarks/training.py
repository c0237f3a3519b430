"""Optimizer steps of megalign beside TRL's: same model, rows, threads and dtype, each in a process with one rank.

Each engine takes its next step when the other has taken one. SFT and DPO are refused where tokens or what the
engines say of them differ: then the work was not the same. What is timed in bf16 is compared in fp32 first. GRPO's
completions are sampled, so only their number is.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from megalign import device
from megalign.errors import UserError
from tools.benchmarks import machine, report
from tools.benchmarks.engines import Worker, stopped_at_the_end, take_turns
from tools.benchmarks.models import found_model, multiplied_weights
from tools.benchmarks.rows import NUM_GENERATIONS, Row, digit_share, make_rows, read_rows

ENGINES = ("megalign", "trl")
TRAINERS = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}
# Operations a weight and token: forward and backward pass, and the reference's forward pass. Not of generation.
OPERATIONS = {"sft": 6, "dpo": 8}
# What both log of the same rows; DPO's loss begins with ln 2 whatever the model, its logprobs and gradient do not.
CHECKED: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "grad_norm"),
    "dpo": ("loss", "grad_norm", "logps/chosen", "logps/rejected"),
    "grpo": (),
}
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
ABS_TOLERANCES = {"grad_norm": 1e-6}  # of rows without anything to learn it is rounding
NUM_COMPARED = 2  # steps; later ones of bf16 drift apart: TRL's weights take no steps smaller than their rounding


class Step(NamedTuple):
    """What an engine answers after an optimizer step."""

    seconds: float
    cpu_seconds: float  # of all its threads: other programs on the machine hardly change it
    tokens: int  # fed to the model, prompts included, padding not
    logs: dict[str, float]  # the loss, and what else is compared
    device_peak: int = 0  # the most bytes of a GPU that torch held at once so far


class StepOnCall(TrainerCallback):
    """Holds the trainer before each step until the pipe says go; transformers' protocol, so both engines take it."""

    def __init__(self, pipe: Connection, checked: Sequence[str]) -> None:
        self.pipe, self.names, self.tokens = pipe, {"loss", *checked}, 0
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
        self.pipe.send(Step(*self.taken, tokens - self.tokens, {name: float(logs[name]) for name in self.names}, peak))
        self.tokens = tokens


# ---- an engine


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
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if options.job != "grpo":
        return {**shared, "max_length": 1024}
    return {
        **shared,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": options.max_completion_length,
        "vllm_gpu_memory_utilization": options.vllm_gpu_memory_utilization,
        "shuffle_dataset": False,
    }


def megalign_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What megalign must be told besides."""
    if options.job == "grpo":
        return {"share_prefixes": options.share_prefixes}
    return {"shuffle_dataset": False}


def trl_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What TRL must be told to do the same work in the same order."""
    # Without a dtype of its own TRL keeps fp32 weights and casts them in every step. Without use_cpu transformers
    # refuses bf16 where there is no GPU.
    given: dict[str, Any] = {"model_init_kwargs": {"dtype": options.dtype}, "use_cpu": not device.on_cuda()}
    if options.job != "grpo":
        return {**given, "train_sampling_strategy": "sequential"}
    # Its colocated vLLM needs a GPU; on a CPU transformers generates.
    return {**given, "use_vllm": device.on_cuda(), "vllm_mode": "colocate"}


def make_config(engine: str, options: argparse.Namespace, scratch: str) -> Any:
    """The engine's own config of the job; whatever a run writes goes below `scratch`."""
    own = megalign_arguments(options) if engine == "megalign" else trl_arguments(options)
    config = getattr(_package(engine), f"{TRAINERS[options.job]}Config")
    return config(**shared_arguments(options, f"{scratch}/{engine}"), **own)


def make_trainer(
    engine: str, options: argparse.Namespace, rows: list[Row], callback: TrainerCallback, scratch: str
) -> Any:
    """The engine's own trainer, ready for its first step."""
    from datasets import Dataset

    trainer = getattr(_package(engine), f"{TRAINERS[options.job]}Trainer")
    given = {"reward_funcs": digit_share} if options.job == "grpo" else {}
    return trainer(
        model=str(options.model),
        args=make_config(engine, options, scratch),
        train_dataset=Dataset.from_list(rows),
        callbacks=[callback],
        **given,
    )


def _package(engine: str) -> Any:
    if engine == "megalign":
        import megalign as package
    else:
        import trl as package
    return package


def work(pipe: Connection, engine: str, options: argparse.Namespace, rows: list[Row], scratch: str) -> None:
    """An engine's process."""
    torch.set_num_threads(options.threads)
    make_trainer(engine, options, rows, StepOnCall(pipe, CHECKED[options.job]), scratch).train()


# ---- the two beside each other


def rows_for(options: argparse.Namespace) -> list[Row]:
    """As many as all steps take, and one more, which is never asked for."""
    count = (options.repetitions + 2) * (options.batch // NUM_GENERATIONS if options.job == "grpo" else options.batch)
    if options.dataset:
        return read_rows(options.dataset, options.job, count)
    return make_rows(options.job, count, options.prompt_days)


def given_to_grpo(options: argparse.Namespace) -> str:
    """What its table says of its flags."""
    days = f", prompts of {options.prompt_days} days" if options.prompt_days > 1 else ""
    return days + ("" if options.share_prefixes else ", prefixes not shared")


def compared(job: str, dtype: str, number: int) -> list[str]:
    """What both engines must log alike in step `number`, counted from 0.

    Two things are compared in fp32 only, which comes before anything is timed in bf16. There the gradient of a few rows
    is 4 to 7 % from its fp32 one in either engine, and DPO's loss after a step is of differences between sums of
    logprobs, which bf16 weights after a step of 1e-6 move less than rounding does.
    """
    if number >= NUM_COMPARED:
        return []
    rounded = {"grad_norm"} | ({"loss"} if job == "dpo" and number > 0 else set())
    return [name for name in CHECKED[job] if dtype == "float32" or name not in rounded]


def check_same_work(job: str, dtype: str, number: int, ours: Step, theirs: Step) -> None:
    """Raises where the engines were not given the same rows in step `number`, or do not compute the same of them."""
    if job != "grpo" and ours.tokens != theirs.tokens:
        raise UserError(
            f"megalign fed {ours.tokens} tokens of the step's rows to its model and TRL {theirs.tokens}, so nothing is "
            "compared; give rows that both cut and tokenize alike"
        )
    for name in compared(job, dtype, number):
        tolerances = {"rel_tol": TOLERANCES[dtype], "abs_tol": ABS_TOLERANCES.get(name, 0.0)}
        if not math.isclose(ours.logs[name], theirs.logs[name], **tolerances):
            raise UserError(
                f"{name} is {ours.logs[name]:.6g} of megalign's step and {theirs.logs[name]:.6g} of TRL's, further "
                f"apart than {TOLERANCES[dtype]:g} of it in {dtype}, so nothing is measured; "
                "tools/compare_with_trl.py shows where they part"
            )


def check_in_fp32(options: argparse.Namespace, rows: list[Row]) -> None:
    """Raises where the engines do not compute the same in fp32, where rounding hides nothing."""
    exact = argparse.Namespace(**{**vars(options), "dtype": "float32"})
    found = []
    for engine in ENGINES:  # one after the other: fp32 states of both might not fit where those in bf16 do
        with tempfile.TemporaryDirectory() as scratch, stopped_at_the_end() as keep:
            worker = keep(Worker(engine, scratch, work, engine, exact, rows, scratch))
            found.append([worker.step() for _ in range(NUM_COMPARED)])
    for number, steps in enumerate(zip(*found, strict=True)):
        check_same_work(options.job, exact.dtype, number, *steps)


def summarize(job: str, steps: dict[str, list[Step]], peak_rss: dict[str, int]) -> list[report.Entry]:
    """One entry an engine; its ratio is TRL's seconds by its own: above 1 is faster."""
    seconds = {engine: [step.seconds for step in steps[engine]] for engine in ENGINES}
    return [
        {
            "job": job,
            "engine": engine,
            "median_s": statistics.median(seconds[engine]),
            "seconds": seconds[engine],
            "cpu_s": statistics.median(step.cpu_seconds for step in steps[engine]),
            "tokens_per_s": sum(step.tokens for step in steps[engine]) / sum(seconds[engine]),
            "ratio": report.median_ratio(seconds["trl"], seconds[engine]),
            "losses": [step.logs["loss"] for step in steps[engine]],
            "peak_rss": peak_rss[engine],
            "peak_device": max(step.device_peak for step in steps[engine]),
        }
        for engine in ENGINES
    ]


def with_rates(entry: report.Entry, options: argparse.Namespace, limits: machine.Limits) -> report.Entry:
    """The entry with what it did of operations: `flops` per second, and `mfu` of this machine's matrix product."""
    if entry["job"] not in OPERATIONS:
        return {**entry, "flops": None, "mfu": None}
    flops = OPERATIONS[entry["job"]] * multiplied_weights(options.model) * entry["tokens_per_s"]
    return {**entry, "flops": flops, "mfu": flops / limits.best_flops}


def run(options: argparse.Namespace) -> None:
    """Measures, shows, writes."""
    options.model = found_model(options.model)
    torch.set_num_threads(options.threads)
    rows, console = rows_for(options), report.console()
    if options.dtype == "bfloat16" and CHECKED[options.job]:
        console.print(f"[dim]the first {NUM_COMPARED} steps in fp32, compared")
        check_in_fp32(options, rows)
    with tempfile.TemporaryDirectory() as scratch, stopped_at_the_end() as keep:
        workers = [keep(Worker(engine, scratch, work, engine, options, rows, scratch)) for engine in ENGINES]
        answers, limits = take_turns(
            workers,
            options.repetitions,
            options.dtype,
            console,
            lambda step: f"{step.seconds:.2f} s {step.tokens} tokens",
            lambda number, found: check_same_work(options.job, options.dtype, number, *found),
        )
        peak_rss = {worker.name: worker.peak_rss() for worker in workers}
    entries = summarize(options.job, dict(zip(ENGINES, answers, strict=True)), peak_rss)
    entries = [with_rates(entry, options, machine.median_limits(limits)) for entry in entries]
    what = {"sft": "rows", "dpo": "pairs", "grpo": f"completions of at most {options.max_completion_length} tokens"}
    found = report.Report(
        title=f"{options.job}: {options.batch} {what[options.job]} a step, medians of {options.repetitions}, "
        f"{options.model.name}, {options.dtype}{given_to_grpo(options)}",
        entries=entries,
        columns={
            "engine": lambda entry: entry["engine"],
            "s": lambda entry: f"{entry['median_s']:.3f}",
            "CPU s": lambda entry: f"{entry['cpu_s']:.2f}",
            "tokens/s": lambda entry: f"{entry['tokens_per_s']:.0f}",
            "x TRL": lambda entry: f"{entry['ratio']:.2f}",
            "GFLOP/s": lambda entry: "-" if entry["flops"] is None else f"{entry['flops'] / 1e9:.0f}",
            "MFU": lambda entry: "-" if entry["mfu"] is None else f"{entry['mfu']:.1%}",
            "loss": lambda entry: f"{entry['losses'][0]:.4f}",
            "RSS GB": lambda entry: f"{entry['peak_rss'] / 1e9:.2f}",
            "GPU GB": lambda entry: f"{entry['peak_device'] / 1e9:.2f}" if entry["peak_device"] else "-",
        },
        limits=limits,
    )
    report.finish(found, options, console)
