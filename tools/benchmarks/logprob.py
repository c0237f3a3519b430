"""Logprob and entropy of given tokens, forward and backward, beside torch's log_softmax, gather and sum.

Twice: from logits that are there (megalign.ops), and with the head's product in it (megalign.parallel.vocab). Each
engine has a process of its own; the gradient is of a sum in which each logprob and entropy has a weight of its own.
Results that differ are an error. Memory is measured in a pass that is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from megalign import device, ops
from megalign.errors import UserError
from megalign.parallel.groups import Axis
from megalign.parallel.vocab import token_scores
from tools.benchmarks import machine, report
from tools.benchmarks.engines import Worker, asked, stopped_at_the_end, take_turns

ENGINES = ("megalign", "torch")
GIVEN, HEAD = "logits given", "head fused"
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
ALONE = Axis(group=None, rank=0, size=1, ranks=[0])
_NUM_PROBES = 4


class Case(NamedTuple):
    """What is computed."""

    what: str  # GIVEN or HEAD
    vocab: int
    tokens: int
    hidden: int
    dtype: str


class Answer(NamedTuple):
    """A pass, forward and backward."""

    seconds: float
    cpu_seconds: float
    extra_bytes: int | None = None  # of the first pass alone, as the results
    results: dict[str, np.ndarray] | None = None


class VocabScores(torch.autograd.Function):
    """(logprobs, entropy) [n] of logits [n, V], over which backward writes their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over the logits."""
        top, total, weighted, target, _ = ops.vocab_statistics(logits, labels, num_real=logits.shape[1])
        log_sum = total.log()
        log_normaliser, entropy = top + log_sum, log_sum - weighted / total
        ctx.save_for_backward(logits, labels, log_normaliser, entropy)
        return target - log_normaliser, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None]:
        """Another."""
        logits, labels, log_normaliser, entropy = ctx.saved_tensors
        gradient = ops.vocab_gradient_(
            logits,
            labels,
            log_normaliser=log_normaliser,
            entropy=entropy,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
            num_real=logits.shape[1],
        )
        return gradient, None


def scores_in_torch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same, as it is written down."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=-1)


class Problem:
    """The numbers of a case, equal in both processes."""

    def __init__(self, case: Case) -> None:
        self.case, where, dtype = case, device.device(), getattr(torch, case.dtype)
        draw = torch.Generator(device=where).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=where)

        self.labels = torch.randint(case.vocab, (case.tokens,), generator=draw, device=where)
        self.shares = random(2, case.tokens)  # of each logprob and entropy in the sum
        if case.what == GIVEN:
            self._kept = (2 * random(case.tokens, case.vocab)).to(dtype)
            self.inputs = [self._kept.clone()]
        else:
            hidden = random(case.tokens, case.hidden)
            self.inputs = [hidden.to(dtype), (2 * random(case.vocab, case.hidden) / case.hidden**0.5).to(dtype)]
        for tensor in self.inputs:
            tensor.requires_grad_()
        self._probes = [random(tensor.shape[1], _NUM_PROBES) for tensor in self.inputs]

    def restore(self) -> None:
        """The logits, which may hold a gradient."""
        if self.case.what == GIVEN:
            with torch.no_grad():
                self.inputs[0].copy_(self._kept)

    def scores(self, engine: str) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy), with their graph."""
        if self.case.what == GIVEN:
            logits = self.inputs[0]
            return (VocabScores.apply if engine == "megalign" else scores_in_torch)(logits, self.labels)
        hidden, weight = self.inputs
        if engine == "torch":
            return scores_in_torch(hidden @ weight.T, self.labels)
        found = token_scores(hidden, weight, self.labels, temperature=None, vocab_size=self.case.vocab, tp=ALONE)
        return found.logprobs, found.entropy

    def solve(self, engine: str) -> tuple[Tensor, ...]:
        """(logprobs, entropy, a gradient for each input)."""
        logprobs, entropy = self.scores(engine)
        total = (logprobs * self.shares[0] + entropy * self.shares[1]).sum()
        gradients = torch.autograd.grad(total, self.inputs)  # where it is written over the logits, they themselves
        return logprobs.detach(), entropy.detach(), *(gradient.detach() for gradient in gradients)

    def results(self, solved: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """What the processes compare: logprobs, entropy, and some random sums over each row of the gradients."""
        logprobs, entropy, *gradients = solved
        found = {"logprob": logprobs, "entropy": entropy}
        names = (
            ["gradient of the logits"] if self.case.what == GIVEN else ["gradient of the hidden states", "the head's"]
        )
        for name, gradient, probe in zip(names, gradients, self._probes, strict=True):
            rows = max(1, 2**24 // gradient.shape[1])  # no whole gradient in fp32
            found[f"gradient of the {name}"] = torch.cat([part.float() @ probe for part in gradient.split(rows)])
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def work(pipe: Connection, engine: str, case: Case, threads: int) -> None:
    """An engine's process: the first answer has memory and results, the others have times."""
    torch.set_num_threads(threads)
    if engine == "megalign":
        device.select_device()  # which also says how bf16 is multiplied here
    Problem(case._replace(tokens=8, vocab=64, hidden=8)).solve(engine)  # what is loaded once is nobody's memory
    problem, first = Problem(case), True
    for _ in asked(pipe):
        problem.restore()
        device.synchronize()
        if first:
            with machine.PeakMemory() as peak:
                solved = problem.solve(engine)
            pipe.send(Answer(0.0, 0.0, peak.extra, problem.results(solved)))
            first = False
        else:
            started = time.perf_counter(), time.process_time()
            solved = problem.solve(engine)
            device.synchronize()
            pipe.send(Answer(time.perf_counter() - started[0], time.process_time() - started[1]))
        del solved


def check_same_results(case: Case, ours: Answer, theirs: Answer) -> None:
    """Raises where the two are further apart than rounding."""
    assert ours.results is not None and theirs.results is not None
    for name, value in theirs.results.items():
        off = float(np.linalg.norm(ours.results[name] - value) / np.linalg.norm(value))
        if not off <= TOLERANCES[case.dtype]:  # NaN is not
            raise UserError(
                f"with {case.what}, vocabulary {case.vocab}, megalign's {name} is {off:.2g} of its size away from "
                f"torch's, more than {TOLERANCES[case.dtype]:g}, so nothing is compared; run tests/test_ops.py"
            )


def measure(
    case: Case, options: argparse.Namespace, console: Console
) -> tuple[list[report.Entry], list[machine.Limits]]:
    """An entry for each engine, and what the machine gave meanwhile."""
    console.print(f"[dim]{case.what}, vocabulary {case.vocab}")
    extra: list[int] = []

    def check(number: int, found: Sequence[Answer]) -> None:
        if number == 0:
            check_same_results(case, *found)
            extra.extend(answer.extra_bytes or 0 for answer in found)

    with tempfile.TemporaryDirectory() as scratch, stopped_at_the_end() as keep:
        workers = [keep(Worker(engine, scratch, work, engine, case, options.threads)) for engine in ENGINES]
        answers, limits = take_turns(
            workers, options.repetitions, case.dtype, console, lambda answer: f"{answer.seconds:.3f} s", check
        )
    return summarize(case, answers, extra, machine.median_limits(limits)), limits


def summarize(
    case: Case, answers: Sequence[Sequence[Answer]], extra: Sequence[int], limits: machine.Limits
) -> list[report.Entry]:
    """One entry an engine; its ratio is torch's seconds by its own.

    `memory_share` is what a pass must move at least (logits read twice, their gradient written) by what a copy moves in
    its time; `mfu` its three products by what a matrix product does.
    """
    size = getattr(torch, case.dtype).itemsize
    seconds = [[answer.seconds for answer in found] for found in answers]
    entries = []
    for engine, found, own, bytes_ in zip(ENGINES, answers, seconds, extra, strict=True):
        median = statistics.median(own)
        moved = 3 * case.tokens * case.vocab * size / median
        products = 6 * case.tokens * case.vocab * case.hidden / median
        entries.append(
            {
                "job": "logprob",
                **case._asdict(),
                "engine": engine,
                "median_s": median,
                "seconds": own,
                "cpu_s": statistics.median(answer.cpu_seconds for answer in found),
                "ratio": report.median_ratio(seconds[ENGINES.index("torch")], own),
                "extra_bytes": bytes_,
                "extra_share": bytes_ / max(extra[ENGINES.index("torch")], 1),
                "memory_share": moved / limits.copied if case.what == GIVEN else None,
                "mfu": products / limits.best_flops if case.what == HEAD else None,
            }
        )
    return entries


def run(options: argparse.Namespace) -> None:
    """Measures, shows, writes."""
    torch.set_num_threads(options.threads)
    console, entries, limits = report.console(), [], []
    for what in (GIVEN, HEAD):
        for vocab in options.vocab:
            case = Case(what, vocab, options.tokens, options.hidden, options.dtype)
            found, beside = measure(case, options, console)
            entries += found
            limits += beside
    of_head = f"{options.hidden} hidden, {options.dtype}"
    shown = report.Report(
        title=f"logprob: {options.tokens} tokens, {of_head}, medians of {options.repetitions}",
        entries=entries,
        columns={
            "what": lambda entry: f"{entry['what']}, {entry['vocab']:,}: {entry['engine']}",
            "s": lambda entry: f"{entry['median_s']:.4f}",
            "CPU s": lambda entry: f"{entry['cpu_s']:.3f}",
            "x torch": lambda entry: f"{entry['ratio']:.2f}",
            "extra MB": lambda entry: f"{entry['extra_bytes'] / 1e6:.0f}",
            "of torch's": lambda entry: f"{entry['extra_share']:.3f}",
            "of a copy": lambda entry: "-" if entry["memory_share"] is None else f"{entry['memory_share']:.0%}",
            "MFU": lambda entry: "-" if entry["mfu"] is None else f"{entry['mfu']:.0%}",
        },
        limits=limits,
    )
    report.finish(shown, options, console)
