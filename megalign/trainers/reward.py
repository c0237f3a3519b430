"""RewardTrainer: a model of which of two answers people prefer (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from megalign.algos.reward import reward_loss
from megalign.config import RewardConfig
from megalign.data.broken import Skipped
from megalign.data.preference import prepare_reward_pairs, sequences_of_reward_pair
from megalign.data.scored import pad_of
from megalign.train_engine import TrainEngine
from megalign.trainers.base import DATA_FIELDS
from megalign.trainers.offline import OfflineTrainer, Sequences


class RewardTrainer(OfflineTrainer):
    """TRL's RewardTrainer: model, args, train_dataset, eval_dataset, processing_class, callbacks."""

    config_class = RewardConfig
    data_fields = (*DATA_FIELDS, "max_length")
    refused_arguments = {
        "optimizer_cls_and_kwargs": "the optimizer is Megatron's sharded AdamW; set learning_rate and adam_*",
    }

    def make_policy(self) -> TrainEngine:
        """The model with a score head: its own, or a new one on a language model."""
        return TrainEngine(self.model_path, self.args, self.groups, score_head=True)

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset:
        """Pairs of whole texts; those that are too long are dropped, as in TRL."""
        return prepare_reward_pairs(
            dataset,
            self.processing_class,
            self.args,
            vocab_size=self.architecture.vocab_size,
            pad=self._pad,
            skipped=skipped,
        )

    def sequences(self, rows: Sequence[Mapping[str, Any]]) -> Sequences:
        """Chosen and rejected of each row."""
        return [sequence for row in rows for sequence in sequences_of_reward_pair(row, self._pad)]

    @property
    def _pad(self) -> int | None:
        return pad_of(self.special_tokens, self.architecture.pad_token_id)

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        return reward_loss(*inputs, center_rewards_coefficient=self.args.center_rewards_coefficient)
