"""From scored completions to the batches that an optimizer step learns from: what goes where, and the columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalign.algos.importance import SAMPLING_COUNTS, rollout_importance_weights, sampling_metrics
from megalign.batch import Batch, Completion, Counts, Metric
from megalign.data.balance import Budget
from megalign.data.collate import completion_sequence, completion_sequences, packed_share, unpack
from megalign.parallel.groups import ParallelGroups
from megalign.parallel.reduce import CountFn, gather_rows, reduce_counts, reduce_metrics
from megalign.rollout.engine import awake
from megalign.train_engine import TrainEngine
from megalign.trainers.reference import Reference
from megalign.trainers.run import Run


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """One optimizer step's part: this data-parallel rank's microbatches and the global counts."""

    batches: list[Batch]
    counts: Counts
    metrics: dict[str, float] = field(default_factory=dict)  # to be logged with the step, known before it

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint in the middle of a generation batch."""
        batches = [{one.name: getattr(batch, one.name) for one in fields(batch)} for batch in self.batches]
        return {"batches": batches, "counts": vars(self.counts), "metrics": self.metrics}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Minibatch:
        """The minibatch of which `state` was taken."""
        batches = [Batch(**batch) for batch in state["batches"]]
        return cls(batches=batches, counts=Counts(**state["counts"]), metrics=state["metrics"])

    def map(self, change: Callable[[Batch], Batch]) -> Minibatch:
        """The minibatch with every batch changed."""
        return replace(self, batches=[change(batch) for batch in self.batches])


@dataclass(frozen=True, kw_only=True)
class Credited:
    """A round whose sequences or tokens know what they were worth."""

    minibatches: list[Minibatch]
    advantages: Tensor  # [N] of each completion, for the table of completions
    metrics: dict[str, float]


def split_completions(num_completions: int, num_updates: int, *, seed: int, step: int) -> list[list[int]]:
    """Indices of the completions of each optimizer step, in order, for those of a prompt to be neighbours; drawn only
    if there is more than one step."""
    order = list(range(num_completions))
    if num_updates > 1:
        order = np.random.default_rng((seed, 2, step)).permutation(num_completions).tolist()
    size = num_completions // num_updates
    return [sorted(order[start : start + size]) for start in range(0, num_completions, size)]


def step_counts(loss_tokens: Sequence[int], rows: Sequence[int], *, num_updates: int = 1) -> Counts:
    """Global counts of the step that learns from `rows`; every rank holds all completions, so none travel.

    `loss_tokens` are those of each completion of the round; `generation_tokens` is the step's equal share of
    them: dapo's denominator.
    """
    return Counts(
        tokens=float(sum(loss_tokens[row] for row in rows)),
        sequences=float(len(rows)),
        generation_tokens=sum(loss_tokens) / num_updates,
    )


class ExperienceMaker:
    """Batches with the columns that the policy loss reads, each from the engine that knows it."""

    def __init__(
        self,
        args: Any,
        groups: ParallelGroups,
        policy: TrainEngine,
        reference: Reference | None,
        run: Run,
        budget: Budget | None,
        *,
        needs_old_logprobs: bool,
        corrects_sampler: bool,
    ) -> None:
        self.args, self.groups = args, groups
        self.policy, self.reference, self.run, self.budget = policy, reference, run, budget
        self.needs_old_logprobs, self.corrects_sampler = needs_old_logprobs, corrects_sampler

    def batches(
        self, completions: Sequence[Completion], rows: Sequence[int], micro_batch: int, budget: Budget | None = None
    ) -> list[Batch]:
        """This rank's packed microbatches of the completions at `rows`, with index and temperature."""

        def sequences_of(part: list[int]) -> list[dict[str, Any]]:
            return completion_sequences(
                [completions[row] for row in part],
                mask_truncated_completions=self.args.mask_truncated_completions,
                temperature=self.args.temperature,
            )

        share = packed_share(rows, sequences_of, self.groups, micro_batch=micro_batch, budget=budget)
        if share.imbalance is not None:
            self.run.window.add({"perf/imbalance": share.imbalance})
        return [
            replace(batch, rows=_known(completions[row].row_number for row in part))
            for part, batch in share.microbatches
        ]

    def dealt_anew(self, parts: Sequence[Minibatch]) -> Minibatch:
        """One step's minibatch on this replica, from those of all the replicas of an earlier layout."""
        sequences = [
            sequence
            for part in parts
            for batch in part.batches
            for sequence in zip(unpack(batch), _rows_of_sequences(batch), strict=True)
        ]
        # As they were dealt out first: at the same layout they make the same microbatches again.
        sequences.sort(key=lambda sequence: sequence[0]["index"])

        def sequences_of(some: list[int]) -> list[dict[str, Any]]:
            return [sequences[number][0] for number in some]

        micro_batch = self.args.per_device_train_batch_size
        numbers = range(len(sequences))
        share = packed_share(numbers, sequences_of, self.groups, micro_batch=micro_batch, budget=self.budget)
        return replace(
            parts[0],
            batches=[
                replace(batch, rows=_known(sequences[number][1] for number in part))
                for part, batch in share.microbatches
            ],
        )

    def loss_tokens(self, completions: Sequence[Completion]) -> list[int]:
        """How many tokens of each completion count in the loss."""
        cut = self.args.mask_truncated_completions
        sequences = (completion_sequence(completion, mask_truncated_completions=cut) for completion in completions)
        return [sum(sequence["loss_mask"][1:]) for sequence in sequences]

    def minibatches(self, completions: Sequence[Completion], *, step: int, num_updates: int) -> list[Minibatch]:
        """The completions of a round as its optimizer steps."""
        micro_batch = self.args.per_device_train_batch_size
        loss_tokens = self.loss_tokens(completions)
        return [
            Minibatch(
                batches=self.batches(completions, rows, micro_batch, self.budget),
                counts=step_counts(loss_tokens, rows, num_updates=num_updates),
            )
            for rows in split_completions(len(completions), num_updates, seed=self.args.seed, step=step)
        ]

    def add_columns(self, minibatches: list[Minibatch]) -> tuple[list[Minibatch], dict[str, float]]:
        """Reference and old logprobs and importance weights where needed, and TRL's sampling/* metrics."""
        metrics: dict[str, float] = {}
        if self.reference is not None:
            with self.run.phases("reference"):
                minibatches = self.with_token_column(minibatches, "ref_logprobs", self.reference.engine, "logprobs")
        if self.needs_old_logprobs:
            with self.run.phases("logprob"):
                minibatches = self.with_token_column(minibatches, "old_logprobs", self.policy, "logprobs")
        if self.corrects_sampler and self.needs_old_logprobs:
            metrics = self._sampling_metrics(minibatches)
            minibatches = [minibatch.map(self._with_importance_weights) for minibatch in minibatches]
        elif self.corrects_sampler:
            minibatches = [self._with_counts(minibatch, SAMPLING_COUNTS) for minibatch in minibatches]
        return minibatches, metrics

    def corrected(self, logprobs: Tensor, batch: Batch, counts: Counts) -> tuple[Batch, dict[str, Metric]]:
        """For the loss of a policy that has not changed since it sampled: its logprobs are the old ones.

        The batch with the columns that `add_columns` gives it when it has not, and the sampling/* metrics.
        """
        if not self.corrects_sampler or self.needs_old_logprobs:
            return batch, {}
        batch = batch.with_token_columns(old_logprobs=logprobs.detach())
        return self._with_importance_weights(batch), sampling_metrics(batch, counts, **self._importance_settings())

    def with_token_column(
        self, minibatches: list[Minibatch], name: str, engine: TrainEngine, output: str
    ) -> list[Minibatch]:
        """A column that an engine knows, from one pass without gradient over all of them."""
        with awake(engine):
            outputs = engine.forward([batch for minibatch in minibatches for batch in minibatch.batches], (output,))
        # Batches wait on the CPU until their step; the engine takes them to its device.
        return with_token_columns(minibatches, [{name: found[output].cpu()} for found in outputs])

    def with_sequence_column(self, minibatches: list[Minibatch], name: str, values: Tensor) -> list[Minibatch]:
        """[N] values of all completions of the job -> each sequence's own."""

        def change(batch: Batch) -> Batch:
            if not batch.num_sequences:  # Batch.dummy
                return batch
            return batch.with_sequence_columns(**{name: values[batch["index"].long()]})

        return [minibatch.map(change) for minibatch in minibatches]

    def per_completion(self, minibatches: list[Minibatch], measure: Callable[[Batch], Tensor]) -> Tensor:
        """[N]: what `measure` [S] says of each completion of the job, on every rank."""
        mine: dict[int, float] = {}
        for batch in (batch for minibatch in minibatches for batch in minibatch.batches if batch.num_sequences):
            mine.update(zip(batch["index"].int().tolist(), measure(batch).tolist(), strict=True))
        return torch.tensor(gather_rows(mine, self.groups.dp))

    def _importance_settings(self) -> dict[str, Any]:
        return {
            "mode": self.args.vllm_importance_sampling_mode,
            "clip_max": self.args.vllm_importance_sampling_clip_max,
            "clip_min": self.args.vllm_importance_sampling_clip_min,
        }

    def _with_importance_weights(self, batch: Batch) -> Batch:
        weights = rollout_importance_weights(batch, **self._importance_settings())
        return batch.with_token_columns(importance_weights=weights)

    def _with_counts(self, minibatch: Minibatch, named: Mapping[str, CountFn]) -> Minibatch:
        found = reduce_counts(minibatch.batches, self.groups, named).named
        counts = replace(minibatch.counts, named={**minibatch.counts.named, **found})
        return replace(minibatch, counts=counts)

    def _sampling_metrics(self, minibatches: list[Minibatch]) -> dict[str, float]:
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        counts = reduce_counts(batches, self.groups, SAMPLING_COUNTS)
        shares = [sampling_metrics(batch, counts, **self._importance_settings()) for batch in batches]
        return reduce_metrics(shares, self.groups)


def _known(rows: Iterable[int | None]) -> tuple[int, ...]:
    """A Batch's rows: of each completion its prompt's; none where one is not known."""
    found = tuple(rows)
    return () if None in found else found


def _rows_of_sequences(batch: Batch) -> Sequence[int | None]:
    return batch.rows if len(batch.rows) == batch.num_sequences else [None] * batch.num_sequences


def total_counts(minibatches: Sequence[Minibatch]) -> Counts:
    """The global counts of a whole round."""
    return Counts(
        tokens=sum(minibatch.counts.tokens for minibatch in minibatches),
        sequences=sum(minibatch.counts.sequences for minibatch in minibatches),
    )


def with_token_columns(minibatches: list[Minibatch], columns: Sequence[Mapping[str, Tensor]]) -> list[Minibatch]:
    """The minibatches with the columns of their batches, in order."""
    following = iter(columns)
    return [minibatch.map(lambda batch: batch.with_token_columns(**next(following))) for minibatch in minibatches]


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """TRL's completions/*: lengths of all, and of those that ended by themselves; 0 where none did."""
    lengths = np.array([len(completion.completion_ids) for completion in completions], dtype=np.float64)
    ended = np.array([completion.finish_reason == "stop" for completion in completions])
    terminated = lengths[ended] if ended.any() else np.zeros(1)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
        "completions/mean_terminated_length": float(terminated.mean()),
        "completions/min_terminated_length": float(terminated.min()),
        "completions/max_terminated_length": float(terminated.max()),
    }
