"""SFTTrainer: supervised fine-tuning on prepared rows, packed microbatch by microbatch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset

from megalign.algos.supervised import sft_loss
from megalign.batch import Batch
from megalign.config import SFTConfig
from megalign.conversion.hf_files import read_config
from megalign.data.chat import load_tokenizer
from megalign.data.collate import pack
from megalign.data.datasets import prepare_sft
from megalign.data.packing import sequences_of
from megalign.data.sampler import EpochSampler, shard
from megalign.train_engine import StepResult
from megalign.trainers.arguments import has_tokenizer
from megalign.trainers.base import DATA_FIELDS, Trainer


class SFTTrainer(Trainer):
    """TRL's SFTTrainer: model, args, train_dataset, eval_dataset, processing_class, callbacks."""

    config_class = SFTConfig
    data_fields = (*DATA_FIELDS, "max_length", "packing", "packing_strategy")
    refused_arguments = {
        "compute_loss_func": "the loss runs inside the pipeline schedule; loss_type chooses nll or dft",
        "formatting_func": "bring rows into the dataset's form before training: dataset.map(formatting_func)",
        "optimizer_cls_and_kwargs": "the optimizer is Megatron's sharded AdamW; set learning_rate and adam_*",
    }

    def load_tokenizer(self) -> Any:
        """The model's tokenizer, with the end token and chat template that the config names."""
        eos_token, template = self.args.eos_token, self.args.chat_template_path
        if not has_tokenizer(self.model_path) and eos_token is template is None:
            return None
        return load_tokenizer(self.model_path, eos_token=eos_token, chat_template_path=template)

    def changes_tokenizer(self) -> bool:
        """Also by the end token and chat template that the config names."""
        return super().changes_tokenizer() or (self.args.eos_token, self.args.chat_template_path) != (None, None)

    def tokenized(self, dataset: Dataset, *, for_evaluation: bool) -> Dataset:
        """Rows of tokens and loss masks, or packs of them."""
        packing = self.args.eval_packing if for_evaluation else None
        vocab_size = read_config(self.model_path)["vocab_size"]
        return prepare_sft(dataset, self.processing_class, self.args, packing=packing, vocab_size=vocab_size)

    def micro_steps_per_epoch(self) -> int:
        """Batches that a data-parallel rank takes in an epoch; the last may be short."""
        return math.ceil(len(self.train_rows) / (self.args.per_device_train_batch_size * self.groups.dp.size))

    def updates(self, epoch: int, first: int) -> Iterator[StepResult]:
        """One optimizer step for each global batch."""
        args, dp = self.args, self.groups.dp
        sampler = EpochSampler(
            len(self.train_rows),
            args.per_device_train_batch_size * args.gradient_accumulation_steps * dp.size,
            seed=args.data_order_seed,
            shuffle=args.shuffle_dataset,
        )
        sampler.load_state_dict({"epoch": epoch, "position": first})
        for _ in range(first, sampler.batches_per_epoch):
            rows = next(sampler)
            self.run.count_tokens(sum(len(ids) for ids in self.train_rows[rows]["input_ids"]))
            yield self.update(self._batches(self.train_rows, rows, args.per_device_train_batch_size))

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        return sft_loss(*inputs, loss_type=self.args.loss_type)

    def evaluation(self, rows: Dataset) -> dict[str, float]:
        """Mean over the loss tokens of all rows, each row once."""
        batches = self._batches(rows, range(len(rows)), self.args.per_device_eval_batch_size)
        return self.policy.eval_step(batches, self.loss)

    def _batches(self, rows: Dataset, order: Sequence[int], micro_batch: int) -> list[Batch]:
        dp = self.groups.dp
        return [
            pack(
                [sequence for row in part for sequence in sequences_of(rows[row])],
                multiple=self.groups.token_multiple,
            )
            for part in shard(order, dp_rank=dp.rank, dp_size=dp.size, micro_batch=micro_batch)
        ]
