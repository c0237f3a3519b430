"""SFTTrainer: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from megalign.algos.supervised import sft_loss
from megalign.config import SFTConfig
from megalign.data.broken import Skipped
from megalign.data.packing import sequences_of
from megalign.data.supervised import prepare_sft
from megalign.trainers.base import DATA_FIELDS
from megalign.trainers.offline import OfflineTrainer, Sequences


class SFTTrainer(OfflineTrainer):
    """TRL's SFTTrainer: model, args, train_dataset, eval_dataset, processing_class, callbacks."""

    config_class = SFTConfig
    data_fields = (*DATA_FIELDS, "max_length", "packing", "packing_strategy")
    refused_arguments = {
        "compute_loss_func": "the loss runs inside the pipeline schedule; loss_type chooses nll or dft",
        "formatting_func": "bring rows into the dataset's form before training: dataset.map(formatting_func)",
        "optimizer_cls_and_kwargs": "the optimizer is Megatron's sharded AdamW; set learning_rate and adam_*",
    }

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset:
        """Rows of tokens and loss masks, or packs of them."""
        packing, size = self.args.eval_packing if for_evaluation else None, self.architecture.vocab_size
        return prepare_sft(dataset, self.processing_class, self.args, packing=packing, vocab_size=size, skipped=skipped)

    def sequences(self, rows: Sequence[Mapping[str, Any]]) -> Sequences:
        """A row, or the rows of a pack."""
        return [sequence for row in rows for sequence in sequences_of(row)]

    def rows_needed(self) -> int | None:
        """How many rows make up a pack is not known before they are tokenized."""
        return None if self.args.packing else super().rows_needed()

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        return sft_loss(*inputs, loss_type=self.args.loss_type)
