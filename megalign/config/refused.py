"""Fields of TRL 1.16's (and transformers') configs that are not ours: why, and which field comes nearest.

A value listed as inert asks for nothing, or for what is always done, and is accepted; others raise. A test
walks every field of TRL's configs over these tables, so that none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NOT_BUILT = "it is not built yet"
_HUB = "nothing is uploaded; upload output_dir with the hf command after training"
_SPLIT = "the model is split by Megatron, with no second framework beside it"
_LOADER = "rows are tokenized once before training, so there is no data loader with workers"
_LORA = "adapters are not built yet; training is of all parameters"
_QUANT = "quantized training is not built yet"
_MOE = "mixture-of-experts models are not built yet"
_SAPO = "the sapo loss is not built yet"
_VESPO = "the vespo loss is not built yet"
_SERVER = "vLLM runs inside the training ranks; a separate server is not built yet"
_HF_GENERATE = "completions are sampled by vLLM, never by transformers"
_ENTROPY = "entropy terms of the loss are not built yet"
_BEST = "checkpoints are kept by age; keeping the best one is not built yet"
_PREDICTIONS = "evaluation yields metrics and keeps no predictions"
_DEVICE = "ranks use CUDA where torch sees a GPU and the CPU elsewhere (CUDA_VISIBLE_DEVICES= hides the GPUs)"


class Refusal(NamedTuple):
    """Why a field of TRL is not ours, the nearest field that is, and the values that are accepted all the
    same."""

    reason: str
    nearest: str
    inert: tuple[Any, ...] = ()


def is_inert(refusal: Refusal, value: Any) -> bool:
    """Whether `value` is accepted; False is not 0, and the values need not be hashable."""
    return any(type(value) is type(one) and value == one for one in refusal.inert)


_TRAINING: dict[str, Refusal] = (
    {
        # optimizer and loss
        "optim": Refusal("the optimizer is AdamW", "adam_beta1", ("adamw_torch", "adamw_torch_fused")),
        "optim_args": Refusal("the optimizer is AdamW", "adam_epsilon", (None, "")),
        "optim_target_modules": Refusal("the optimizer is AdamW over all parameters", "adam_epsilon", (None,)),
        "warmup_ratio": Refusal("transformers 5 dropped it", "warmup_steps (below 1: a fraction)", (None, 0, 0.0)),
        "average_tokens_across_devices": Refusal("losses are always divided by global counts", "loss_type", (True,)),
        "label_smoothing_factor": Refusal(NOT_BUILT, "loss_type", (0, 0.0)),
        "neftune_noise_alpha": Refusal(NOT_BUILT, "weight_decay", (None,)),
        "router_aux_loss_coef": Refusal(_MOE, "tensor_model_parallel_size", (None,)),
        # precision and memory
        "fp16": Refusal("fp16 needs loss scaling, which is not built", "bf16", (False,)),
        "fp16_full_eval": Refusal("evaluation uses the training precision", "bf16", (False,)),
        "bf16_full_eval": Refusal("evaluation uses the training precision", "bf16", (False,)),
        "tf32": Refusal("torch's own setting is left alone", "bf16", (None,)),
        "gradient_checkpointing_kwargs": Refusal(
            "Megatron recomputes, not torch.utils.checkpoint", "recompute_granularity", (None, {})
        ),
        "activation_offloading": Refusal(NOT_BUILT, "gradient_checkpointing", (False,)),
        "torch_compile": Refusal("Megatron's layers are not compiled", "bf16", (False,)),
        "torch_compile_backend": Refusal("Megatron's layers are not compiled", "bf16", (None,)),
        "torch_compile_mode": Refusal("Megatron's layers are not compiled", "bf16", (None,)),
        "use_liger_kernel": Refusal(
            "logprobs are computed in token chunks already, without the batch's logits",
            "gradient_checkpointing",
            (False,),
        ),
        "liger_kernel_config": Refusal("there are no Liger kernels here", "gradient_checkpointing", (None,)),
        "use_cache": Refusal("training keeps no KV cache", "gradient_checkpointing", (False,)),
        "torch_empty_cache_steps": Refusal("memory is handed over phase by phase", "gradient_checkpointing", (None,)),
        "auto_find_batch_size": Refusal("another batch size is another run", "per_device_train_batch_size", (False,)),
        "full_determinism": Refusal(
            "on CPU runs are deterministic as they are; on CUDA it is not built yet", "seed", (False,)
        ),
        "use_cpu": Refusal(_DEVICE, "bf16", (False,)),
        # model
        "model_init_kwargs": Refusal(
            "weights go straight into Megatron's model, not through from_pretrained", "bf16", (None, {})
        ),
        "trust_remote_code": Refusal(
            "no code from a checkpoint is run; llama, qwen2 and qwen3 are built in",
            "model_name_or_path",
            (False,),
        ),
        "model_revision": Refusal(
            "name a directory with the revision that you want", "model_name_or_path", ("main", None)
        ),
        "dtype": Refusal("bf16 says it: bfloat16 with fp32 master weights, or float32", "bf16"),
        "torch_dtype": Refusal("bf16 says it: bfloat16 with fp32 master weights, or float32", "bf16"),
        "attn_implementation": Refusal("attention is Megatron's", "context_parallel_size", (None,)),
        "pad_to_multiple_of": Refusal("batches are packed and never padded", "max_steps", ("auto", None)),
        # several ranks
        "accelerator_config": Refusal(_SPLIT, "tensor_model_parallel_size", (None, {})),
        "parallelism_config": Refusal(_SPLIT, "tensor_model_parallel_size", (None,)),
        "fsdp": Refusal(_SPLIT, "use_distributed_optimizer", (None, "", False, [])),
        "fsdp_config": Refusal(_SPLIT, "use_distributed_optimizer", (None, {})),
        "deepspeed": Refusal(_SPLIT, "use_distributed_optimizer", (None, "")),
        "ddp_find_unused_parameters": Refusal(
            "Megatron's DDP has no such search", "use_distributed_optimizer", (None, False)
        ),
        "ddp_bucket_cap_mb": Refusal("Megatron chooses its buckets", "use_distributed_optimizer", (None,)),
        "ddp_broadcast_buffers": Refusal(
            "the models have no buffers to broadcast", "use_distributed_optimizer", (None, False)
        ),
        "ddp_static_graph": Refusal("Megatron's DDP has no such mode", "use_distributed_optimizer", (None, False)),
        "ddp_backend": Refusal("NCCL on CUDA, gloo on CPU", "ddp_timeout", (None,)),
        "local_rank": Refusal("torchrun or Slurm gives it to each process", "tensor_model_parallel_size", (-1,)),
        "overlap_grad_reduce": Refusal(NOT_BUILT, "use_distributed_optimizer", (False,)),
        "overlap_param_gather": Refusal(NOT_BUILT, "use_distributed_optimizer", (False,)),
        "tp_comm_overlap": Refusal("it needs Transformer Engine", "tensor_model_parallel_size", (False,)),
        "recompute_method": Refusal(
            "full recomputation is uniform, layer by layer", "recompute_granularity", (None, "uniform")
        ),
        "recompute_num_layers": Refusal(
            "full recomputation is uniform, layer by layer", "recompute_granularity", (None, 1)
        ),
        "recompute_modules": Refusal("selective recomputes the core attention", "recompute_granularity", (None,)),
        "fp8": Refusal(NOT_BUILT, "bf16", (None, False)),
        "fp4": Refusal(NOT_BUILT, "bf16", (None, False)),
        # data
        "dataset_streaming": Refusal("rows are tokenized once before training", "dataset_name", (False,)),
        "streaming": Refusal("rows are tokenized once before training", "dataset_name", (False,)),
        "datasets": Refusal("mixtures are not built yet; write the mixture to one file", "dataset_name", (None, [])),
        "test_split_size": Refusal("write the test rows to a file of their own", "eval_dataset_name", (None,)),
        "ignore_bias_buffers": Refusal("TRL's debugging aid for DDP", "use_distributed_optimizer", (False,)),
        "dataloader_drop_last": Refusal("the sampler decides, the same at every layout", "num_train_epochs", (False,)),
        "dataloader_num_workers": Refusal(_LOADER, "per_device_train_batch_size", (0,)),
        "dataloader_pin_memory": Refusal(_LOADER, "per_device_train_batch_size", (False,)),
        "dataloader_persistent_workers": Refusal(_LOADER, "per_device_train_batch_size", (False,)),
        "dataloader_prefetch_factor": Refusal(_LOADER, "per_device_train_batch_size", (None,)),
        "dataloader_multiprocessing_context": Refusal(_LOADER, "per_device_train_batch_size", (None,)),
        "dataloader_in_order": Refusal(_LOADER, "shuffle_dataset", (True,)),
        "label_names": Refusal("columns have fixed names", "dataset_name", (None,)),
        "train_sampling_strategy": Refusal("order is random or as given", "shuffle_dataset"),
        "length_column_name": Refusal("rows are not grouped by length", "shuffle_dataset", ("length",)),
        "ignore_data_skip": Refusal("a resumed run goes on where it stopped", "resume_from_checkpoint", (False,)),
        # logging
        "log_level": Refusal("set it with Python's logging", "disable_tqdm", ("passive",)),
        "log_level_replica": Refusal("set it with Python's logging", "disable_tqdm", ("warning",)),
        "log_on_each_node": Refusal("the job logs once", "logging_steps", (False,)),
        "logging_nan_inf_filter": Refusal("a nan loss is logged as nan", "logging_steps", (False,)),
        "include_num_input_tokens_seen": Refusal("num_tokens is always logged", "logging_steps", (False, "no")),
        "skip_memory_metrics": Refusal("memory is not logged", "logging_steps", (True,)),
        "debug": Refusal("transformers' debug modes hook its own trainer", "logging_first_step", (None, "", [])),
        "trackio_space_id": Refusal("set it as an environment variable of trackio", "project", (None,)),
        "trackio_bucket_id": Refusal("set it as an environment variable of trackio", "project", (None,)),
        "trackio_static_space_id": Refusal("set it as an environment variable of trackio", "project", (None,)),
        # evaluation
        "do_train": Refusal("megalign sft and grpo train", "max_steps", (True,)),
        "do_eval": Refusal("eval_strategy says it", "eval_strategy", (False,)),
        "do_predict": Refusal(_PREDICTIONS, "eval_strategy", (False,)),
        "prediction_loss_only": Refusal(_PREDICTIONS, "eval_strategy", (True,)),
        "eval_do_concat_batches": Refusal(_PREDICTIONS, "eval_strategy", (True,)),
        "eval_use_gather_object": Refusal(_PREDICTIONS, "eval_strategy", (False,)),
        "eval_accumulation_steps": Refusal(_PREDICTIONS, "per_device_eval_batch_size", (None,)),
        "include_for_metrics": Refusal(_PREDICTIONS, "eval_strategy", ([],)),
        "batch_eval_metrics": Refusal(_PREDICTIONS, "eval_strategy", (False,)),
        # checkpoints and the hub
        "save_only_model": Refusal(
            "a checkpoint is for resuming; the model alone is saved at the end", "save_strategy", (False,)
        ),
        "save_on_each_node": Refusal("output_dir is on a file system that all nodes share", "output_dir", (False,)),
        "enable_jit_checkpoint": Refusal(NOT_BUILT, "save_steps", (False,)),
        "load_best_model_at_end": Refusal(_BEST, "save_total_limit", (False,)),
        "metric_for_best_model": Refusal(_BEST, "save_total_limit", (None,)),
        "greater_is_better": Refusal(_BEST, "save_total_limit", (None,)),
        "restore_callback_states_from_checkpoint": Refusal(NOT_BUILT, "resume_from_checkpoint", (False,)),
        "push_to_hub": Refusal(_HUB, "output_dir", (False,)),
        "hub_model_id": Refusal(_HUB, "output_dir", (None,)),
        "hub_strategy": Refusal(_HUB, "output_dir", ("every_save",)),
        "hub_token": Refusal(_HUB, "output_dir", (None,)),
        "hub_private_repo": Refusal(_HUB, "output_dir", (None,)),
        "hub_always_push": Refusal(_HUB, "output_dir", (False,)),
        "hub_revision": Refusal(_HUB, "output_dir", (None,)),
        # adapters and quantization (TRL's ModelConfig and constructor arguments)
        "use_peft": Refusal(_LORA, "tensor_model_parallel_size", (False,)),
        "peft_config": Refusal(_LORA, "tensor_model_parallel_size", (None,)),
        "quantization_config": Refusal(_QUANT, "bf16", (None,)),
        "load_in_8bit": Refusal(_QUANT, "bf16", (False,)),
        "load_in_4bit": Refusal(_QUANT, "bf16", (False,)),
    }
    | {
        name: Refusal(_QUANT, "bf16")
        for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    }
    | {
        name: Refusal(_LORA, "tensor_model_parallel_size")
        for name in (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_target_parameters",
            "lora_modules_to_save",
            "lora_task_type",
            "use_rslora",
            "use_dora",
        )
    }
)

SFT: Mapping[str, Refusal] = _TRAINING | {
    "dataset_kwargs": Refusal(
        "rows with input_ids are taken as they are, others are tokenized", "dataset_text_field", (None, {})
    ),
    "pad_token": Refusal("batches are packed and never padded", "eos_token", (None,)),
    "padding_free": Refusal("batches are always packed, never padded", "packing", (True,)),
    "remove_unused_columns": Refusal("columns that SFT does not read are dropped", "dataset_text_field", (True,)),
}

GRPO: Mapping[str, Refusal] = _TRAINING | {
    "remove_unused_columns": Refusal("every column goes to the reward functions", "reward_funcs", (False, None)),
    "cast_lm_head_to_fp32": Refusal("the softmax is in fp32 as it is", "bf16", (False,)),
    "ds3_gather_for_generation": Refusal(_SPLIT, "vllm_tensor_parallel_size", (True,)),
    "cache_implementation": Refusal(_HF_GENERATE, "vllm_gpu_memory_utilization", (None,)),
    "use_transformers_continuous_batching": Refusal(_HF_GENERATE, "use_vllm", (False,)),
    "transformers_continuous_batching_config": Refusal(_HF_GENERATE, "use_vllm", (None, {})),
    "use_transformers_paged": Refusal(_HF_GENERATE, "use_vllm", (False,)),
    "vllm_server_base_url": Refusal(_SERVER, "vllm_mode", (None,)),
    "vllm_server_host": Refusal(_SERVER, "vllm_mode"),
    "vllm_server_port": Refusal(_SERVER, "vllm_mode"),
    "vllm_server_timeout": Refusal(_SERVER, "vllm_mode"),
    "vllm_group_port": Refusal(_SERVER, "vllm_mode"),
    "vllm_importance_sampling_cap": Refusal("TRL renamed it", "vllm_importance_sampling_clip_max", (None,)),
    "delta": Refusal("two-sided clipping is not built yet", "epsilon_high", (None,)),
    "sapo_temperature_neg": Refusal(_SAPO, "loss_type"),
    "sapo_temperature_pos": Refusal(_SAPO, "loss_type"),
    "vespo_k_pos": Refusal(_VESPO, "loss_type"),
    "vespo_lambda_pos": Refusal(_VESPO, "loss_type"),
    "vespo_k_neg": Refusal(_VESPO, "loss_type"),
    "vespo_lambda_neg": Refusal(_VESPO, "loss_type"),
    "multi_objective_aggregation": Refusal(
        "aggregation after normalizing (GDPO) is not built yet", "reward_weights", ("sum_then_normalize",)
    ),
    "sync_ref_model": Refusal("a moving reference model is not built yet", "beta", (False,)),
    "ref_model_mixup_alpha": Refusal("a moving reference model is not built yet", "beta"),
    "ref_model_sync_steps": Refusal("a moving reference model is not built yet", "beta"),
    "top_entropy_quantile": Refusal(_ENTROPY, "loss_type", (1, 1.0)),
    "entropy_coef": Refusal(_ENTROPY, "beta", (0, 0.0)),
    "use_adaptive_entropy": Refusal(_ENTROPY, "beta", (False,)),
    "entropy_coef_min": Refusal(_ENTROPY, "beta"),
    "entropy_coef_max": Refusal(_ENTROPY, "beta"),
    "entropy_coef_delta": Refusal(_ENTROPY, "beta"),
    "entropy_target": Refusal(_ENTROPY, "beta"),
    "off_policy_mask_threshold": Refusal(
        "off-policy sequence masking is not built yet", "vllm_importance_sampling_mode", (None,)
    ),
    "max_tool_calling_iterations": Refusal("tools are not built yet", "reward_funcs", (None,)),
    "tools": Refusal("tools are not built yet", "reward_funcs", (None, [])),
    "environment_factory": Refusal("environments are not built yet", "reward_funcs", (None,)),
    "rollout_func": Refusal("own rollouts are not built yet", "generation_kwargs", (None,)),
    "reward_model_name_or_path": Refusal(
        "reward models are not built yet; call one from a reward function", "reward_funcs", (None,)
    ),
    "reward_processing_classes": Refusal("reward models are not built yet", "reward_funcs", (None,)),
    "log_multimodal": Refusal("completions are text", "log_completions", (False,)),
    "log_completions_hub_repo": Refusal(_HUB, "log_completions", (None,)),
    "max_prompt_length": Refusal("TRL dropped it", "vllm_max_model_length", (None,)),
}
