"""Rows of preferences in every format, and what TRL 1.16's own trainers make of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

Rows = list[dict[str, Any]]

USER = {"role": "user", "content": "What color is the sky?"}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is the lazy dog."}
WHY = {"role": "user", "content": "Why?"}
AIR = {"role": "assistant", "content": "Because of the air."}
FOX = {"role": "assistant", "content": "The quick brown fox jumps over."}

PAIRS: dict[str, Rows] = {
    "text": [
        {"prompt": "What color is the sky? ", "chosen": "It is blue.", "rejected": "It is the lazy dog."},
        {"prompt": "1 + 2 =", "chosen": " 3", "rejected": "one two three<|endoftext|>"},
        {"prompt": "one", "chosen": "", "rejected": " two"},
    ],
    "text with the prompt inside": [
        {"chosen": "What color is the sky? It is blue.", "rejected": "What color is the sky? The air."},
        {"chosen": "1 + 2 = 3", "rejected": "1 + 2 = one two three"},
        {"chosen": "six", "rejected": "five"},
    ],
    "messages": [
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [SYSTEM, USER, BLUE, WHY], "chosen": [AIR], "rejected": [FOX]},
        {"prompt": [USER], "chosen": [BLUE, WHY, AIR], "rejected": [GREEN, WHY, FOX]},
    ],
    "messages with the prompt inside": [
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"chosen": [SYSTEM, USER, BLUE, WHY, AIR], "rejected": [SYSTEM, USER, BLUE, WHY, FOX]},
    ],
}
CONVERSATIONAL = [form for form in PAIRS if "messages" in form]


def unpadded(batch: Mapping[str, torch.Tensor], name: str, prefix: str = "") -> list[list[Any]]:
    """The rows of a padded batch without their pads."""
    pairs = zip(batch[prefix + name], batch[f"{prefix}attention_mask"], strict=True)
    return [values[there.bool()].tolist() for values, there in pairs]


def trl_pairs(rows: Rows, tokenizer: PreTrainedTokenizerBase, args: Any) -> Rows:
    """DPOTrainer's preparation and collation."""
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, args, "train"
    )
    return collated_pairs(list(prepared), args)


def collated_pairs(rows: Rows, args: Any) -> Rows:
    """The columns of `prepare_pairs` from DPOTrainer's collator."""
    collate = DataCollatorForPreference(
        pad_token_id=0, max_length=args.max_length, truncation_mode=args.truncation_mode
    )
    batch = collate(rows)
    ids, masks = unpadded(batch, "input_ids"), unpadded(batch, "completion_mask")
    return [
        {
            "chosen_ids": ids[place],
            "rejected_ids": ids[place + len(rows)],
            "chosen_mask": [bool(bit) for bit in masks[place]],
            "rejected_mask": [bool(bit) for bit in masks[place + len(rows)]],
        }
        for place in range(len(rows))
    ]


def trl_orpo_pairs(rows: Rows, tokenizer: PreTrainedTokenizerBase, args: Any) -> Rows:
    """ORPOTrainer's preparation; its labels are -100 off the completion."""
    PartialState()  # TRL's warnings ask accelerate which process they are in
    trainer = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=args.max_length)
    trainer.build_tokenized_answer = partial(ORPOTrainer.build_tokenized_answer, trainer)
    dataset = Dataset.from_list(rows).map(maybe_extract_prompt)
    dataset = dataset.map(maybe_apply_chat_template, fn_kwargs={"processing_class": tokenizer})
    tokenized = [ORPOTrainer.tokenize_row(trainer, row) for row in dataset]
    return [
        {
            f"{side}_{name}": [label != -100 for label in row[f"{side}_labels"]]
            if name == "mask"
            else row[f"{side}_input_ids"]
            for name in ("ids", "mask")
            for side in ("chosen", "rejected")
        }
        for row in tokenized
    ]


def trl_reward_pairs(rows: Rows, tokenizer: PreTrainedTokenizerBase, args: Any) -> Rows:
    """RewardTrainer's preparation."""
    prepared = RewardTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list(rows), tokenizer, args, "train")
    names = ["chosen_ids", "rejected_ids", *(["margin"] if "margin" in rows[0] else [])]
    return [{name: row[name] for name in names} for row in prepared]


def trl_unpaired(rows: Rows, tokenizer: PreTrainedTokenizerBase, args: Any) -> Rows:
    """KTOTrainer's preparation and collation, with the mismatched sequences of batches."""
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    prepared = KTOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    batch = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=args.max_length)(list(prepared))
    columns = {
        "desirable": batch["label"].tolist(),
        "input_ids": unpadded(batch, "input_ids"),
        "loss_mask": [[bool(bit) for bit in mask] for mask in unpadded(batch, "completion_mask")],
        "kl_ids": unpadded(batch, "input_ids", "KL_"),
        "kl_mask": [[bool(bit) for bit in mask] for mask in unpadded(batch, "completion_mask", "KL_")],
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
