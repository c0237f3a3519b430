"""TRL 1.16's own DPO, KTO, ORPO and reward code, run on recorded tensors: what our numbers are compared with.

`_compute_loss` and its siblings run as they are; a namespace holds the attributes that they read, and the models are
replaced by what they would have returned. Tables are [S, W] in our order, a pair's two sequences as neighbours; TRL
has all chosen sequences first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from tests.algos.trl_reference import accelerator

Result = tuple[Tensor, dict[str, float]]


def trl_dpo(tables: Mapping[str, Tensor], *, discopop_tau: float = 0.05, **options: Any) -> Result:
    """Loss and metrics; `options` are the trainer's attributes of the same names."""
    tables = {name: torch.cat([table[0::2], table[1::2]]) for name, table in tables.items()}
    trainer = _trainer(
        args=SimpleNamespace(discopop_tau=discopop_tau, gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        ref_model=_model(tables, "ref_logprobs"),
        **options,
    )
    policy = _model(tables, "logprobs")
    return DPOTrainer._compute_loss(trainer, policy, _inputs(tables), False), _metrics(trainer)


def trl_kto(
    tables: Mapping[str, Tensor],
    desirable: Tensor,  # [S] bool
    kl_logps: Tensor,  # [S]
    ref_kl_logps: Tensor,  # [S]
    *,
    loss_type: str,
    **options: Any,
) -> Result:
    """Loss and metrics; the log probabilities of mismatched completions are given."""
    reference = _model(tables, "ref_logprobs")
    trainer = _trainer(
        _compute_kl_logps=lambda model, _: ref_kl_logps if model is reference else kl_logps,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        precompute_ref_logps=False,
        ref_model=reference,
        **options,
    )
    inputs = {**_inputs(tables), "label": desirable}
    return KTOTrainer._compute_loss(trainer, _model(tables, "logprobs"), inputs, False), _metrics(trainer)


def trl_orpo(
    logits: Tensor,  # [S, L, V], of the token after each
    tokens: Tensor,  # [S, L]
    completions: Tensor,  # [S, L] bool
    real: Tensor,  # [S, L] bool, False on padding
    *,
    beta: float,
) -> Result:
    """Loss and metrics from full logits."""
    batch = {}
    for name, start in (("chosen", 0), ("rejected", 1)):
        batch[f"{name}_input_ids"] = tokens[start::2]
        batch[f"{name}_attention_mask"] = real[start::2].long()
        batch[f"{name}_labels"] = tokens[start::2].masked_fill(~completions[start::2], -100)
    trainer = _trainer(
        beta=beta,
        is_encoder_decoder=False,
        padding_value=0,
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    trainer.concatenated_forward = partial(ORPOTrainer.concatenated_forward, trainer)
    trainer.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, trainer)
    stacked = torch.cat([logits[0::2], logits[1::2]])
    return ORPOTrainer.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=stacked), batch)


def trl_reward(scores: Tensor, margin: Tensor | None, *, center_rewards_coefficient: float | None) -> Result:
    """Loss and metrics from [S] scores; margin is [P]."""
    stacked = torch.cat([scores[0::2], scores[1::2]])
    inputs = {"attention_mask": torch.ones(len(scores), 1)} | ({} if margin is None else {"margin": margin})
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient))

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=stacked[:, None])

    return RewardTrainer.compute_loss(trainer, model, inputs), _metrics(trainer)


def _trainer(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=accelerator(),
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        **attributes,
    )


def _metrics(trainer: SimpleNamespace) -> dict[str, float]:
    """What the loss logged; counting tokens is the trainer's business."""
    return {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}


def _inputs(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A prompt of one token, then the completions; the fused head labels what completion_mask says."""
    mask = tables["loss_mask"].long()
    completion_mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
    ids = torch.ones_like(completion_mask)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": completion_mask}


def _model(tables: Mapping[str, Tensor], logprobs: str) -> Callable[..., SimpleNamespace]:
    """A model with TRL's fused head: zeros where nothing counts."""
    mask = tables["loss_mask"]
    outputs = SimpleNamespace(
        log_probs=tables[logprobs].masked_fill(~mask, 0.0),
        entropy=tables["entropy"].masked_fill(~mask, 0.0),
        log_sum_sq_probs=tables["log_sum_squares"].masked_fill(~mask, 0.0),
        mean_logits=tables["mean_logits"].masked_fill(~mask, 0.0),
        is_top1=(tables["argmax_correct"] > 0) & mask,
    )
    return lambda **_: outputs
