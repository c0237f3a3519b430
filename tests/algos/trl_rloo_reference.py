"""TRL 1.16's own RLOO code, run on recorded tensors (see trl_reference.py)."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from trl.trainer.rloo_trainer import RLOOTrainer

from tests.algos.trl_reference import PAD, accelerator


def trl_rloo_loss(
    inputs: dict[str, Tensor],  # [B, C] each, advantages and old_logps [B]
    logprobs: Tensor,  # [B, C]
    entropy: Tensor,  # [B, C]
    *,
    epsilon: float,
    epsilon_high: float | None,
) -> tuple[Tensor, dict[str, float]]:
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        _metrics={"train": defaultdict(list)},
        accelerator=accelerator(),
        aux_loss_enabled=False,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        epsilon_low=epsilon,
        model=SimpleNamespace(training=True),
    )
    loss = RLOOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def trl_rloo_generation(
    rewards: Tensor,  # [N, F]
    weights: Tensor,  # [F]
    *,
    prompts: list[list[int]],
    completions: list[list[int]],
    old_logprobs: Tensor,  # [N, C]
    ref_logprobs: Tensor,  # [N, C]
    num_generations: int,
    beta: float,
    reward_clip_range: tuple[float, float] | None,
    normalize_advantages: bool,
) -> tuple[dict[str, Any], dict[str, float]]:
    names = [f"reward_{index}" for index in range(rewards.shape[1])]
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    logs = {name: [] for name in ("prompt", "completion", "advantages", "images")}
    trainer = SimpleNamespace(
        _calculate_rewards=lambda *_: rewards,
        _generate=lambda _: (prompts, completions, completions),
        _get_per_token_logps_and_entropies=lambda which, *_, **__: (
            old_logprobs if which is model else ref_logprobs,
            None,
            None,
        ),
        _logs={**logs, "rewards": defaultdict(list), "extra": defaultdict(list)},
        _metrics={"train": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        accelerator=accelerator(),
        args=SimpleNamespace(per_device_train_batch_size=len(prompts), gradient_checkpointing_kwargs=None),
        beta=beta,
        log_multimodal=False,
        mask_truncated_completions=False,
        model=model,
        normalize_advantages=normalize_advantages,
        num_generations=num_generations,
        pad_to_multiple_of=None,
        ref_model=SimpleNamespace(),
        reward_clip_range=reward_clip_range,
        reward_func_names=names,
        reward_funcs=names,
        reward_weights=weights,
    )
    inputs = [{"prompt": str(index)} for index in range(len(prompts))]
    output = RLOOTrainer._generate_and_score_completions(trainer, inputs)
    return output, {name: values[0] for name, values in trainer._metrics["train"].items()}
