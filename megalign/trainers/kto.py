"""KTOTrainer: preference optimization on single answers, good or bad (arXiv 2402.01306)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from megalign.algos.unpaired import KTO_COUNTS, kto_loss, recommended_weights
from megalign.batch import Batch
from megalign.config import KTOConfig
from megalign.data.broken import Skipped
from megalign.data.collate import packed_share
from megalign.data.unpaired import kl_sequence, prepare_unpaired, sequence_of_unpaired
from megalign.parallel.reduce import gather_over
from megalign.trainers.base import DATA_FIELDS
from megalign.trainers.offline import Sequences
from megalign.trainers.preference import PreferenceTrainer
from megalign.trainers.reference import RowSequence


class KTOTrainer(PreferenceTrainer):
    """TRL's KTOTrainer: model, ref_model, args, train_dataset, eval_dataset, processing_class, callbacks."""

    config_class = KTOConfig
    data_fields = (*DATA_FIELDS, "max_length")
    named_counts = KTO_COUNTS

    def __init__(self, model: str | None = None, ref_model: str | None = None, args: Any = None, **given: Any) -> None:
        super().__init__(model, ref_model, args, **given)
        if self.train_rows is not None:
            self._advise_weights(self.train_rows["desirable"])

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset:
        """Single answers, each with the mismatched one of its neighbour in the same step."""
        shuffled = self.args.shuffle_dataset and not for_evaluation
        return prepare_unpaired(
            dataset,
            self.processing_class,
            self.args,
            # An evaluation is one step, of two answers a row at most.
            block=2 * len(dataset) if for_evaluation else self.rows_per_step,
            shuffle_seed=self.args.data_order_seed if shuffled else None,
            vocab_size=self.architecture.vocab_size,
            skipped=skipped,
        )

    @property
    def keeps_batches(self) -> bool:
        """Whether z is estimated: a row and the one whose answer it borrows belong to one step."""
        return self._estimates_kl

    def sequences(self, rows: Sequence[Mapping[str, Any]]) -> Sequences:
        """One for each row."""
        return [sequence_of_unpaired(row) for row in rows]

    def reference_columns(self) -> Mapping[str, RowSequence]:
        """Of the row's own answer and, where z is estimated, of the mismatched one."""
        columns: dict[str, RowSequence] = {"ref_logprobs": sequence_of_unpaired}
        return {**columns, "ref_kl_logprobs": kl_sequence} if self._estimates_kl else columns

    def with_columns(self, batches: list[Batch], rows: Sequence[int], dataset: Dataset) -> list[Batch]:
        """The reference's logprobs, and z."""
        batches = self.with_reference(batches)
        kl = self._kl(rows, dataset) if self._estimates_kl else 0.0
        return [batch.with_sequence_columns(kl=torch.full((batch.num_sequences,), kl)) for batch in batches]

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        args = self.args
        return kto_loss(
            *inputs,
            loss_type=args.loss_type,
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )

    def _advise_weights(self, desirable: Sequence[bool]) -> None:
        good = sum(desirable)
        weights = {name: getattr(self.args, name) for name in ("desirable_weight", "undesirable_weight")}
        ranges = recommended_weights(good, len(desirable) - good, **weights)
        if ranges is not None:
            self.run.say(
                f"of {len(desirable)} answers {good} are desirable, and the weights do not balance the two kinds: "
                f"KTO's authors advise a desirable_weight from {ranges.desirable[0]} to {ranges.desirable[1]}, or an "
                f"undesirable_weight from {ranges.undesirable[0]} to {ranges.undesirable[1]}"
            )

    @property
    def _estimates_kl(self) -> bool:
        return self.args.loss_type == "kto"

    def _kl(self, rows: Sequence[int], dataset: Dataset) -> float:
        """z: the mean log ratio of mismatched answers over the step's rows, at least 0 (arXiv 2402.01306 sec. 4.1)."""

        def sequences_of(part: list[int]) -> Sequences:
            return [kl_sequence(dataset[row]) for row in part]

        micro_batch = self.args.per_device_train_batch_size
        share = packed_share(rows, sequences_of, self.groups, micro_batch=micro_batch)
        batches = self.with_reference([batch for _, batch in share.microbatches])
        with self.run.phases("logprob"):
            outputs = self.policy.forward(batches)
        ratios = [
            batch.per_sequence_sum(output["logprobs"].cpu() - batch["ref_logprobs"])
            for output, batch in zip(outputs, batches, strict=True)
            if batch.num_sequences
        ]
        everyone, _ = gather_over(torch.cat([torch.zeros(0), *ratios]), self.groups.dp)
        return max(0.0, float(everyone.mean()))
