"""ORPOTrainer: likelihood and odds ratio of chosen against rejected, without a reference (arXiv 2403.07691)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from megalign.algos.odds_ratio import ORPO_COUNTS, orpo_loss
from megalign.config import ORPOConfig
from megalign.data.broken import Skipped
from megalign.data.preference import prepare_orpo_pairs, sequences_of_orpo_pair
from megalign.train_engine import TrainEngine
from megalign.trainers.base import DATA_FIELDS
from megalign.trainers.offline import OfflineTrainer, Sequences


class ORPOTrainer(OfflineTrainer):
    """TRL's ORPOTrainer: model, args, train_dataset, eval_dataset, processing_class, callbacks."""

    config_class = ORPOConfig
    data_fields = (*DATA_FIELDS, "max_length", "max_completion_length")
    named_counts = ORPO_COUNTS
    refused_arguments = {
        "model_init": "the model is read from a directory, by each rank its own slices; give its path as model",
    }

    def make_policy(self) -> TrainEngine:
        """The model that is trained; TRL logs the mean of its logits."""
        return TrainEngine(self.model_path, self.args, self.groups, extras=("mean_logits",))

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset:
        """Pairs of prompt and completion."""
        return prepare_orpo_pairs(
            dataset, self.processing_class, self.args, vocab_size=self.architecture.vocab_size, skipped=skipped
        )

    def sequences(self, rows: Sequence[Mapping[str, Any]]) -> Sequences:
        """Chosen and rejected of each row; the likelihood is of the chosen one's prompt as well."""
        return [sequence for row in rows for sequence in sequences_of_orpo_pair(row)]

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        return orpo_loss(*inputs, beta=self.args.beta)
