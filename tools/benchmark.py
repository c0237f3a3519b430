"""Times megalign beside its peers: interleaved in one run, with the machine's own limits measured beside.

    python tools/benchmark.py sft|dpo|grpo    optimizer steps beside TRL's: same model, rows, threads and dtype
    python tools/benchmark.py logprob         logprob and entropy, forward and backward, beside torch's
    python tools/benchmark.py sync            weights into vLLM beside a copy of the same bytes
    python tools/benchmark.py pipeline        idle time of the schedules, and CPU seconds beside one rank's
    python tools/benchmark.py startup         --help, and the way to the end of the first step, beside TRL's
    python tools/benchmark.py convert         the conversion tools beside a copy of the files
    python tools/benchmark.py save            checkpoints beside the training or in it

Medians over repetitions; a ratio is the median over pairs, the peer's seconds by megalign's own: above 1 is faster.
CUDA is used when there is one. TRL comes with tools/requirements-test.txt. `JOB --help` has a job's flags.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the jobs are a package beside this file

from megalign.errors import UserError  # noqa: E402
from tools.benchmarks.models import SHAPES, SMOLLM2  # noqa: E402
from tools.benchmarks.rows import NUM_GENERATIONS  # noqa: E402

DTYPES = ("bfloat16", "float32")
LAYOUTS = ("pp2", "pp4", "pp2xvpp2", "pp4xvpp2")
_RAW = argparse.RawDescriptionHelpFormatter


class Job(NamedTuple):
    """A subcommand: its module in tools/benchmarks, its flags, how often it repeats."""

    module: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    summary: str
    repetitions: int = 5
    needs_trl: bool = False


def model_flags(parser: argparse.ArgumentParser) -> None:
    """What a job that runs a model takes."""
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="Hugging Face directory; SmolLM2 when not given")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations")


def training_flags(parser: argparse.ArgumentParser) -> None:
    """Of sft, dpo and grpo."""
    model_flags(parser)
    parser.add_argument("--dataset", type=Path, help=".jsonl rows in order; made here when not given")
    parser.add_argument("--batch", type=int, help="rows or pairs (4), or completions (32, in groups of 8), a step")
    parser.set_defaults(share_prefixes=True, max_completion_length=0, prompt_days=1)


def grpo_flags(parser: argparse.ArgumentParser) -> None:
    """Of grpo."""
    training_flags(parser)
    parser.add_argument("--max-completion-length", type=int, default=16, help="in tokens")
    parser.add_argument(
        "--vllm-gpu-memory-utilization", type=float, default=0.15, help="of a GPU, which both engines share"
    )
    parser.add_argument("--prompt-days", type=int, default=1, help="of a made prompt's story, 12 tokens each")
    parser.add_argument(
        "--no-share-prefixes",
        dest="share_prefixes",
        action="store_false",
        help="megalign computes the prompt of a group once for each completion",
    )


def logprob_flags(parser: argparse.ArgumentParser) -> None:
    """Of logprob."""
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the logits")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936], help="sizes of the vocabulary")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of logits")
    parser.add_argument("--hidden", type=int, default=576, help="size of the hidden states that the head takes")


def sync_flags(parser: argparse.ArgumentParser) -> None:
    """Of sync."""
    model_flags(parser)
    parser.add_argument("--kv-cache-gib", type=float, default=0.25, help="vLLM's KV cache on a CPU")


def pipeline_flags(parser: argparse.ArgumentParser) -> None:
    """Of pipeline."""
    parser.add_argument("--model", type=Path, help="Hugging Face directory of PP2 for real; made here when not given")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="to measure")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=256, help="of a microbatch")
    parser.add_argument("--sleep-ms", type=float, default=20.0, help="a layer's forward pass; twice that backward")


def startup_flags(parser: argparse.ArgumentParser) -> None:
    """Of startup."""
    training_flags(parser)


def convert_flags(parser: argparse.ArgumentParser) -> None:
    """Of convert."""
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b", help="of a Llama with random weights")
    parser.add_argument("--directory", type=Path, help="where the files go, four times the model's size")


def save_flags(parser: argparse.ArgumentParser) -> None:
    """Of save."""
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="Hugging Face directory; SmolLM2 when not given")
    parser.add_argument("--directory", type=Path, help="where checkpoints go; the system's temporary one if not given")


JOBS = {
    "sft": Job("training", training_flags, "SFT steps beside TRL's", needs_trl=True),
    "dpo": Job("training", training_flags, "DPO steps beside TRL's", needs_trl=True),
    "grpo": Job("training", grpo_flags, "GRPO steps beside TRL's", needs_trl=True),
    "logprob": Job("logprob", logprob_flags, "logprob and entropy, forward and backward, beside torch's"),
    "sync": Job("sync", sync_flags, "weights into vLLM beside a copy of the same bytes"),
    "convert": Job("convert", convert_flags, "both conversions beside a copy of the files", repetitions=3),
    "save": Job("save", save_flags, "checkpoints by the rank and beside it", repetitions=3),
    "pipeline": Job("pipeline", pipeline_flags, "idle time of the schedules, CPU seconds of ranks", repetitions=3),
    "startup": Job("startup", startup_flags, "--help and the first step beside TRL's", repetitions=3, needs_trl=True),
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_RAW)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, job in JOBS.items():
        one = jobs.add_parser(
            name, help=job.summary, description=job.summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        job.add_flags(one)
        one.add_argument("--repetitions", type=int, default=job.repetitions, help="pairs that are timed")
        one.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
        one.add_argument("--json", type=Path, help="file for the list of results")
        one.add_argument("--plot", type=Path, help=".png file for a picture of them")
    options = parser.parse_args(arguments)
    if "batch" in options and options.batch is None:
        options.batch = 4 * NUM_GENERATIONS if options.job == "grpo" else 4
    for name in ("repetitions", "threads", "batch", "tokens", "hidden", "microbatches"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    for size in getattr(options, "vocab", ()):
        if size < 2:
            parser.error(f"--vocab {size} must be at least 2: the only entry's logprob is always 0")
    if options.job == "grpo" and options.batch % NUM_GENERATIONS:
        parser.error(f"--batch {options.batch} must be a multiple of {NUM_GENERATIONS}, the completions of a prompt")
    return options


def check(options: argparse.Namespace) -> None:
    """That what the job needs is installed, and its files can be written, before anything is measured."""
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UserError(f"--{name} {path} is no file's place; name a file in a directory that exists")
    if JOBS[options.job].needs_trl and importlib.util.find_spec("trl") is None:
        raise UserError(f"{options.job} is timed beside TRL, which is not installed; tools/install.sh cpu --test does")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--plot {options.plot} needs matplotlib, which is not installed; pip install matplotlib does")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse_arguments(arguments)
    check(options)
    # Read by the libraries of this process and of those it starts, when they are loaded: torch is not yet.
    os.environ.update(OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false")
    importlib.import_module(f"tools.benchmarks.{JOBS[options.job].module}").run(options)


if __name__ == "__main__":
    from megalign.failure import report_uncaught

    report_uncaught()
    main()
