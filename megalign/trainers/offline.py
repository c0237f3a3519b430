"""OfflineTrainer: the loop of trainers that learn from prepared rows, packed microbatch by microbatch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from megalign.batch import Batch
from megalign.data.balance import Budget
from megalign.data.chat import adapt_tokenizer, load_tokenizer
from megalign.train_engine import StepResult
from megalign.trainers.base import Trainer
from megalign.trainers.rows import numbered_share

Sequences = Sequence[Mapping[str, Any]]  # as data.collate takes them


class OfflineTrainer(Trainer):
    """Global batches of rows in a fixed order; a leaf says what the sequences of a row are, and which loss."""

    keeps_batches = False  # whether rows that were prepared as a step's stay a step's when they are shuffled

    # ---- what a leaf says

    def sequences(self, rows: Sequence[Mapping[str, Any]]) -> Sequences:
        """The sequences of prepared rows, a row's own as neighbours."""
        raise NotImplementedError

    def with_columns(self, batches: list[Batch], rows: Sequence[int], dataset: Dataset) -> list[Batch]:
        """The batches with the columns of passes without gradient; `rows` of `dataset` are the whole step's."""
        return batches

    # ---- the loop

    def load_tokenizer(self) -> Any:
        """The model's tokenizer; that it has none is an error where the config changes it."""
        return load_tokenizer(self.model_path) if self._config_changes_tokenizer else super().load_tokenizer()

    def adapted(self, tokenizer: Any) -> Any:
        """With the end token and chat template that the config names."""
        if not self._config_changes_tokenizer:
            return tokenizer
        args = self.args
        return adapt_tokenizer(tokenizer, eos_token=args.eos_token, chat_template_path=args.chat_template_path)

    def changes_tokenizer(self) -> bool:
        """Also by the end token and chat template that the config names."""
        return super().changes_tokenizer() or self._config_changes_tokenizer

    @property
    def _config_changes_tokenizer(self) -> bool:
        return (self.args.eos_token, self.args.chat_template_path) != (None, None)

    def rows_of(self, steps: int) -> int:
        """A global batch for each."""
        return steps * self.rows_per_step

    def micro_steps_per_epoch(self) -> int:
        """Batches that a data-parallel rank takes in an epoch; the last may be short."""
        return math.ceil(len(self.train_rows) / (self.args.per_device_train_batch_size * self.groups.dp.size))

    def updates(self, epoch: int, first: int) -> Iterator[StepResult]:
        """One optimizer step for each global batch."""
        sampler = self.rows.sampler(
            len(self.train_rows), self.rows_per_step, epoch=epoch, position=first, keep_batches=self.keeps_batches
        )
        for _ in range(first, sampler.batches_per_epoch):
            with self.run.phases("data"):
                rows = next(sampler)
                taken = self.sequences([self.train_rows[row] for row in rows])
                self.run.count_tokens(sum(len(sequence["tokens"]) for sequence in taken))
                micro_batch = self.args.per_device_train_batch_size
                budget = self.rows.budget(shares_prefixes=self.policy.shares_prefixes)
                batches = self._batches(self.train_rows, rows, micro_batch, budget)
            yield self.update(batches)

    def evaluation(self, rows: Dataset) -> dict[str, float]:
        """Means over all rows, each row once."""
        batches = self._batches(rows, range(len(rows)), self.args.per_device_eval_batch_size)
        return self.policy.eval_step(batches, self.loss, counts=self.counts(batches))

    def _batches(
        self, dataset: Dataset, rows: Sequence[int], micro_batch: int, budget: Budget | None = None
    ) -> list[Batch]:
        share = numbered_share(dataset, rows, self.sequences, self.groups, micro_batch=micro_batch, budget=budget)
        if share.imbalance is not None:
            self.run.window.add({"perf/imbalance": share.imbalance})
        return self.with_columns(share.batches, rows, dataset)
