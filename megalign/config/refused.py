"""Fields of TRL 1.16's (PPO: 1.12's) and transformers' configs that are not ours: why, and the nearest field.

A value listed as inert asks for nothing, or for what is always done, and is accepted; others raise. A test
walks every field of TRL's configs over these tables, so that none is ignored. What all configs share is in
refused_training.
"""

from __future__ import annotations

from collections.abc import Mapping

from megalign.config.refused_training import (
    HUB,
    LORA,
    MODEL_INIT,
    SPLIT,
    TRAINING,
    Refusal,
    is_inert,
)

__all__ = ["DPO", "GRPO", "KTO", "MODEL_INIT", "ORPO", "PPO", "RENAMED", "REWARD", "RLOO", "SFT", "Refusal", "is_inert"]

# Names of earlier versions, with the present word: the first that the config has.
RENAMED: Mapping[str, tuple[str, ...]] = {
    "max_seq_length": ("max_length",),
    "evaluation_strategy": ("eval_strategy",),
    "model_name": ("model_name_or_path",),
    "lr": ("learning_rate",),
    "max_new_tokens": ("max_completion_length",),
    "response_length": ("max_completion_length",),
    "vllm_gpu_utilization": ("vllm_gpu_memory_utilization",),
    "vllm_max_model_len": ("vllm_max_model_length",),
    "vllm_guided_decoding_regex": ("vllm_structured_outputs_regex",),
    "wandb_log_unique_prompts": ("log_unique_prompts",),
    "rloo_k": ("num_generations",),
    "cliprange": ("epsilon",),
    "kl_coef": ("beta",),
    "init_kl_coef": ("kl_coef",),
    "target": ("kl_target",),
    "horizon": ("kl_horizon",),
    "ppo_epochs": ("num_ppo_epochs", "num_iterations"),
    "num_ppo_epochs": ("num_iterations",),
    "normalize_advantage": ("normalize_advantages",),
}

_SERVER = "vLLM runs inside the training ranks; a separate server is not built yet"
_HF_GENERATE = "completions are sampled by vLLM, never by transformers"
_ONE_LENGTH = Refusal("TRL dropped it; prompt and completion are cut together", "max_length", (None,))
_BATCH_SIZES = "it follows from the batch size, the accumulation steps and the layout"
_NO_CORRECTION = "old logprobs are always the trainer's own, as in TRL"
_PACKED = "batches are always packed, never padded"

_OFFLINE: Mapping[str, Refusal] = TRAINING | {
    "padding_free": Refusal(_PACKED, "per_device_train_batch_size", (False, True)),
    "pad_token": Refusal(_PACKED, "eos_token", (None,)),
    "padding_value": Refusal(_PACKED, "eos_token", (None,)),
    "remove_unused_columns": Refusal("columns that are not read never reach a batch", "max_length", (True, False)),
}

SFT: Mapping[str, Refusal] = _OFFLINE | {
    "dataset_kwargs": Refusal(
        "rows with input_ids are taken as they are, others are tokenized", "dataset_text_field", (None, {})
    ),
}

_PAIRS: Mapping[str, Refusal] = _OFFLINE | {
    "max_prompt_length": _ONE_LENGTH,
    "is_encoder_decoder": Refusal("the models are decoders", "model_name_or_path", (None, False)),
    "generate_during_eval": Refusal("evaluation yields metrics and samples nothing", "eval_strategy", (False,)),
}

ORPO: Mapping[str, Refusal] = _PAIRS
REWARD: Mapping[str, Refusal] = _PAIRS | {"max_completion_length": _ONE_LENGTH}
KTO: Mapping[str, Refusal] = REWARD
DPO: Mapping[str, Refusal] = REWARD | {
    "rpo_alpha": Refusal("TRL dropped it; it is the loss sft, with rpo_alpha as its weight", "loss_weights", (None,)),
    "reference_free": Refusal("TRL dropped it; ORPO needs no reference", "beta", (False,)),
}

_ONLINE: Mapping[str, Refusal] = TRAINING | {
    "remove_unused_columns": Refusal("every column goes to the reward functions", "reward_funcs", (False, None)),
    "ds3_gather_for_generation": Refusal(SPLIT, "vllm_tensor_parallel_size", (True,)),
    "cache_implementation": Refusal(_HF_GENERATE, "vllm_gpu_memory_utilization", (None,)),
    "use_transformers_continuous_batching": Refusal(_HF_GENERATE, "use_vllm", (False,)),
    "transformers_continuous_batching_config": Refusal(_HF_GENERATE, "use_vllm", (None, {})),
    "use_transformers_paged": Refusal(_HF_GENERATE, "use_vllm", (False,)),
    "vllm_server_base_url": Refusal(_SERVER, "vllm_mode", (None,)),
    "vllm_server_host": Refusal(_SERVER, "vllm_mode"),
    "vllm_server_port": Refusal(_SERVER, "vllm_mode"),
    "vllm_server_timeout": Refusal(_SERVER, "vllm_mode"),
    "vllm_group_port": Refusal(_SERVER, "vllm_mode"),
    "max_tool_calling_iterations": Refusal("tools are not built yet", "reward_funcs", (None,)),
    "tools": Refusal("tools are not built yet", "reward_funcs", (None, [])),
    "environment_factory": Refusal("environments are not built yet", "reward_funcs", (None,)),
    "rollout_func": Refusal("own rollouts are not built yet", "generation_kwargs", (None,)),
    "reward_model_name_or_path": Refusal("reward_funcs takes a reward model's directory", "reward_funcs", (None,)),
    "reward_processing_classes": Refusal(
        "a reward model is read with the tokenizer in its directory", "reward_funcs", (None,)
    ),
    "log_multimodal": Refusal("completions are text", "log_completions", (False, True)),
    "log_completions_hub_repo": Refusal(HUB, "log_completions", (None,)),
    "max_prompt_length": Refusal("TRL dropped it", "vllm_max_model_length", (None,)),
}

GRPO: Mapping[str, Refusal] = _ONLINE | {
    "vllm_importance_sampling_cap": Refusal("TRL renamed it", "vllm_importance_sampling_clip_max", (None,)),
}

RLOO: Mapping[str, Refusal] = _ONLINE | {
    "vllm_importance_sampling_correction": Refusal(_NO_CORRECTION, "epsilon", (False,)),
    "scale_rewards": Refusal("advantages are differences of rewards", "normalize_advantages", (False, "none")),
    "loss_type": Refusal("there is one loss, over sequences", "epsilon"),
}

PPO: Mapping[str, Refusal] = _ONLINE | {
    "vllm_importance_sampling_correction": Refusal(_NO_CORRECTION, "cliprange", (False,)),
    "mask_truncated_completions": Refusal("what has no end token is scored too", "missing_eos_penalty", (False,)),
    "generation_batch_size": Refusal(_BATCH_SIZES, "num_mini_batches", (None,)),
    "steps_per_generation": Refusal(_BATCH_SIZES, "num_mini_batches", (None,)),
    "dynamic_sampling": Refusal("completions are not compared within groups", "num_generations", (False,)),
    "sync_ref_model": Refusal("the reference is the SFT model", "kl_target", (False,)),
    "dataset_num_proc": Refusal("prompts are tokenized by one process", "dataset_name", (None, 1)),
    "local_rollout_forward_batch_size": Refusal(
        "passes without gradient take the microbatches of the training step", "per_device_train_batch_size", (64,)
    ),
    "num_sample_generations": Refusal("samples are shown at each log", "log_completions", (0,)),
    "model_adapter_name": Refusal(LORA, "model_name_or_path", (None,)),
    "ref_adapter_name": Refusal(LORA, "sft_model_path", (None,)),
    "world_size": Refusal("torchrun or Slurm gives it", "tensor_model_parallel_size", (None,)),
    "num_total_batches": Refusal("it follows from total_episodes or max_steps", "total_episodes", (None,)),
    "micro_batch_size": Refusal(_BATCH_SIZES, "per_device_train_batch_size", (None,)),
    "local_batch_size": Refusal(_BATCH_SIZES, "gradient_accumulation_steps", (None,)),
    "batch_size": Refusal(_BATCH_SIZES, "gradient_accumulation_steps", (None,)),
    "local_mini_batch_size": Refusal(_BATCH_SIZES, "num_mini_batches", (None,)),
    "mini_batch_size": Refusal(_BATCH_SIZES, "num_mini_batches", (None,)),
}
