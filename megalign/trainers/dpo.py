"""DPOTrainer: direct preference optimization (arXiv 2305.18290) and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from megalign.algos.preference import DPO_COUNTS, aot_targets, dpo_loss, sequence_logprobs
from megalign.batch import Batch
from megalign.config import DPOConfig
from megalign.data.broken import Skipped
from megalign.data.preference import prepare_pairs, sequences_of_pair
from megalign.parallel.reduce import gather_over
from megalign.trainers.base import DATA_FIELDS
from megalign.trainers.offline import Sequences
from megalign.trainers.preference import PreferenceTrainer
from megalign.trainers.reference import RowSequence


class DPOTrainer(PreferenceTrainer):
    """TRL's DPOTrainer: model, ref_model, args, train_dataset, eval_dataset, processing_class, callbacks."""

    config_class = DPOConfig
    data_fields = (*DATA_FIELDS, "max_length", "truncation_mode")
    named_counts = DPO_COUNTS

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset:
        """Pairs of prompt and completion."""
        return prepare_pairs(
            dataset, self.processing_class, self.args, vocab_size=self.architecture.vocab_size, skipped=skipped
        )

    def sequences(self, rows: Sequence[Mapping[str, Any]]) -> Sequences:
        """Chosen and rejected of each row."""
        return [sequence for row in rows for sequence in sequences_of_pair(row)]

    def reference_columns(self) -> Mapping[str, RowSequence]:
        """One for each of the pair."""
        return {
            f"ref_{side}_logprobs": partial(_side, place=place) for place, side in enumerate(("chosen", "rejected"))
        }

    @property
    def extras(self) -> tuple[str, ...]:
        """WPO weighs pairs by the policy's probabilities."""
        return (*super().extras, "log_sum_squares") if self.args.use_weighting else super().extras

    def with_columns(self, batches: list[Batch], rows: Sequence[int], dataset: Dataset) -> list[Batch]:
        """The reference's logprobs and, for the aot losses, each sequence's counterpart."""
        batches = self.with_reference(batches)
        kinds = [kind for kind in ("aot", "aot_unpaired") if kind in self.args.loss_type]
        return self._with_aot_targets(batches, kinds) if kinds else batches

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        args = self.args
        return dpo_loss(
            *inputs,
            loss_types=args.loss_type,
            loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            f_divergence_type=args.f_divergence_type,
            f_alpha_divergence_coef=args.f_alpha_divergence_coef,
            ld_alpha=args.ld_alpha,
            use_weighting=args.use_weighting,
            discopop_tau=args.discopop_tau,
        )

    def _with_aot_targets(self, batches: list[Batch], kinds: Sequence[str]) -> list[Batch]:
        """Sorting couples the pairs of the whole step: a pass without gradient says who stands where."""
        with self.run.phases("logprob"):
            logprobs = [output["logprobs"].cpu() for output in self.policy.forward(batches)]
        logps, first = self._of_all_pairs(logprobs, batches)
        ref_logps, _ = self._of_all_pairs([_reference(batch) for batch in batches], batches)
        sizes = [batch.num_sequences for batch in batches]
        for kind in kinds:
            targets = aot_targets(logps, ref_logps, kind)[first : first + sum(sizes)].split(sizes)
            batches = [
                batch.with_sequence_columns(**{f"{kind}_target": target})
                for batch, target in zip(batches, targets, strict=True)
            ]
        return batches

    def _of_all_pairs(self, columns: Sequence[Tensor], batches: Sequence[Batch]) -> tuple[Tensor, int]:
        """[S] float64 of the whole step, and where this rank's part of it begins."""
        mine = [
            sequence_logprobs(column, batch, ld_alpha=self.args.ld_alpha)
            for column, batch in zip(columns, batches, strict=True)
        ]
        return gather_over(torch.cat(mine), self.groups.dp)


def _reference(batch: Batch) -> Tensor:
    return batch["ref_logprobs"] if batch.num_sequences else torch.zeros(batch.num_tokens)


def _side(row: Mapping[str, Any], place: int) -> Mapping[str, Any]:
    return sequences_of_pair(row)[place]
