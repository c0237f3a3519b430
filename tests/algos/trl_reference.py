"""TRL 1.16's own GRPO code, run on recorded tensors: what our numbers are compared with.

`GRPOTrainer._compute_loss` and `._generate_and_score_completions` run as they are; a namespace holds the
attributes that they read, and the model and the sampler are replaced by what they would have returned.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

PAD = 0


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        gather=lambda value: value,
        gather_for_metrics=lambda value: value,
        pad_across_processes=lambda value, **_: value,
        sync_gradients=True,
        reduce=lambda value, reduction: value,
    )


OPTIONS = {  # GRPOConfig's defaults
    "delta": None,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_neg": 3.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_neg": 2.0,
    "vespo_lambda_pos": 3.0,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
}


def trl_trainer(
    *,
    loss_type: str,
    level: str,
    epsilon: float,
    epsilon_high: float | None,
    beta: float,
    max_completion_length: int,
    bias_correction: bool,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int = 1,
    use_vllm: bool = False,
    **options: Any,
) -> SimpleNamespace:
    """What `_compute_loss` reads of a trainer; `options` are fields of GRPOConfig."""
    assert set(options) <= set(OPTIONS), options
    args = SimpleNamespace(
        **OPTIONS | options,
        use_bias_correction_kl=bias_correction,
        steps_per_generation=steps_per_generation,
    )
    trainer = SimpleNamespace(
        _entropy_bonus_enabled=args.entropy_coef != 0.0 or args.use_adaptive_entropy,
        _entropy_window_stats=None,
        _last_world_entropy=float("inf"),
        _metrics={"train": defaultdict(list)},
        accelerator=accelerator(),
        args=args,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=gradient_accumulation_steps,
        entropy_coef=args.entropy_coef,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        epsilon_low=epsilon,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=max_completion_length,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        top_entropy_quantile=args.top_entropy_quantile,
        use_adaptive_entropy=args.use_adaptive_entropy,
        use_vllm=use_vllm,
        vllm_importance_sampling_correction=True,
    )
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    return trainer


def run_trl_loss(
    trainer: SimpleNamespace, inputs: dict[str, Tensor], logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """One `_compute_loss` and the metrics of this call."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy, None)
    trainer._metrics["train"].clear()
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def trl_loss(
    inputs: dict[str, Tensor],  # [B, C] each, advantages [B]
    logprobs: Tensor,  # [B, C]
    entropy: Tensor,  # [B, C]
    **settings: Any,
) -> tuple[Tensor, dict[str, float]]:
    trainer = trl_trainer(use_vllm="importance_sampling_ratio" in inputs, **settings)
    return run_trl_loss(trainer, inputs, logprobs, entropy)


def trl_scored_generation(
    rewards: Tensor,  # [N, F]
    weights: Tensor,  # [F]
    *,
    num_generations: int,
    scale_rewards: str,
    prompts: list[list[int]],
    completions: list[list[int]],
    tool_masks: list[list[int]] | None = None,
    rollout_logprobs: list[list[float]] | None = None,
    old_logprobs: Tensor | None = None,  # [N, C]
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
    multi_objective_aggregation: str = "sum_then_normalize",
) -> tuple[dict[str, Any], dict[str, float]]:
    names = [f"reward_{index}" for index in range(rewards.shape[1])]
    logs = {name: [] for name in ("prompt", "completion", "advantages", "images")}
    trainer = SimpleNamespace(
        _calculate_rewards=lambda *_: rewards,
        _generate=lambda _: (prompts, completions, tool_masks, completions, rollout_logprobs, {}, None, None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (old_logprobs, None, None),
        _is_vlm=False,
        _logs={**logs, "rewards": defaultdict(list), "extra": defaultdict(list)},
        _metrics={"train": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        accelerator=accelerator(),
        args=SimpleNamespace(
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(prompts),
            steps_per_generation=1,
        ),
        beta=0.0,
        environment_factories=None,
        environments=None,
        log_multimodal=False,
        mask_truncated_completions=False,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        multi_objective_aggregation=multi_objective_aggregation,
        num_generations=num_generations,
        num_iterations=1,
        pad_to_multiple_of=None,
        reward_func_names=names,
        reward_funcs=names,
        reward_weights=weights,
        scale_rewards=scale_rewards,
        tools=None,
        use_vllm=rollout_logprobs is not None,
        vllm_importance_sampling_clip_max=clip_max,
        vllm_importance_sampling_clip_min=clip_min,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
    )
    inputs = [{"prompt": str(index)} for index in range(len(prompts))]
    output = GRPOTrainer._generate_and_score_completions(trainer, inputs)
    return output, {name: values[0] for name, values in trainer._metrics["train"].items()}
