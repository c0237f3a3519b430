"""Fields of TRL's and transformers' configs that none of ours has: why, and the nearest field. See refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NOT_BUILT = "it is not built yet"
HUB = "nothing is uploaded; upload output_dir with the hf command after training"
SPLIT = "the model is split by Megatron, with no second framework beside it"
LORA = "adapters are not built yet; training is of all parameters"
_LOADER = "rows are tokenized once before training, so there is no data loader with workers"
_QUANT = "quantized training is not built yet"
_BEST = "checkpoints are kept by age; keeping the best one is not built yet"
_PREDICTIONS = "evaluation yields metrics and keeps no predictions"
_DEVICE = "ranks use CUDA where torch sees a GPU and the CPU elsewhere (CUDA_VISIBLE_DEVICES= hides the GPUs)"


class Refusal(NamedTuple):
    """Why a field of TRL is not ours, the nearest field that is, and the values that are accepted all the
    same."""

    reason: str
    nearest: str
    inert: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.reason}; nearest: {self.nearest}"


def is_inert(refusal: Refusal, value: Any) -> bool:
    """Whether `value` is accepted; False is not 0, and the values need not be hashable."""
    return any(type(value) is type(one) and value == one for one in refusal.inert)


TRAINING: Mapping[str, Refusal] = (
    {
        # optimizer and loss
        "optim": Refusal("the optimizer is AdamW", "adam_beta1", ("adamw_torch", "adamw_torch_fused")),
        "optim_args": Refusal("the optimizer is AdamW", "adam_epsilon", (None, "")),
        "optim_target_modules": Refusal("the optimizer is AdamW over all parameters", "adam_epsilon", (None,)),
        "warmup_ratio": Refusal("transformers 5 dropped it", "warmup_steps (below 1: a fraction)", (None, 0, 0.0)),
        "average_tokens_across_devices": Refusal(
            "losses are always divided by global counts", "gradient_accumulation_steps", (True,)
        ),
        "label_smoothing_factor": Refusal(NOT_BUILT, "weight_decay", (0, 0.0)),
        "neftune_noise_alpha": Refusal(NOT_BUILT, "weight_decay", (None,)),
        # precision and memory
        "fp16": Refusal("fp16 needs loss scaling, which is not built", "bf16", (False,)),
        "fp16_full_eval": Refusal("evaluation uses the training precision", "bf16", (False,)),
        "bf16_full_eval": Refusal("evaluation uses the training precision", "bf16", (False,)),
        "tf32": Refusal("torch's own setting is left alone", "bf16", (None,)),
        "gradient_checkpointing_kwargs": Refusal(
            "Megatron recomputes, not torch.utils.checkpoint",
            "recompute_granularity",
            (None, {}, {"use_reentrant": False}, {"use_reentrant": True}),
        ),
        "torch_compile_backend": Refusal("torch's own backend is used", "torch_compile", (None, "inductor")),
        "torch_compile_mode": Refusal("torch's own mode is used", "torch_compile", (None, "default")),
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
        "trust_remote_code": Refusal(
            "no code from a checkpoint is run; the supported families are built in",
            "model_name_or_path",
            (False,),
        ),
        "model_revision": Refusal(
            "name a directory with the revision that you want", "model_name_or_path", ("main", None)
        ),
        "dtype": Refusal("bf16 says it: bfloat16 with fp32 master weights, or float32", "bf16"),
        "torch_dtype": Refusal("bf16 says it: bfloat16 with fp32 master weights, or float32", "bf16"),
        "attn_implementation": Refusal("attention is Megatron's, exact and packed", "gradient_checkpointing", (None,)),
        "pad_to_multiple_of": Refusal(
            "batches are packed and never padded", "per_device_train_batch_size", ("auto", None)
        ),
        # several ranks
        "accelerator_config": Refusal(SPLIT, "tensor_model_parallel_size", (None, {})),
        "parallelism_config": Refusal(SPLIT, "tensor_model_parallel_size", (None,)),
        "fsdp": Refusal(SPLIT, "use_distributed_optimizer", (None, "", False, [])),
        "fsdp_config": Refusal(SPLIT, "use_distributed_optimizer", (None, {})),
        "deepspeed": Refusal(SPLIT, "use_distributed_optimizer", (None, "")),
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
        "tp_comm_overlap": Refusal(
            "its buffers hold one fixed number of tokens, and packed batches differ", "sequence_parallel", (False,)
        ),
        "fp8_param_gather": Refusal("weights stay in bfloat16", "fp8", (False,)),
        "fp4": Refusal(NOT_BUILT, "bf16", (None, False)),
        # data
        "dataset_streaming": Refusal("its name is streaming", "streaming", (False,)),
        "datasets": Refusal(
            "a mixture is a list in dataset_name with its dataset_weights; a script's get_dataset reads this form",
            "dataset_name",
            (None, []),
        ),
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
        "do_train": Refusal("every command trains", "max_steps", (True,)),
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
        "push_to_hub": Refusal(HUB, "output_dir", (False,)),
        "hub_model_id": Refusal(HUB, "output_dir", (None,)),
        "hub_strategy": Refusal(HUB, "output_dir", ("every_save",)),
        "hub_token": Refusal(HUB, "output_dir", (None,)),
        "hub_private_repo": Refusal(HUB, "output_dir", (None,)),
        "hub_always_push": Refusal(HUB, "output_dir", (False,)),
        "hub_revision": Refusal(HUB, "output_dir", (None,)),
        # adapters and quantization (TRL's ModelConfig and constructor arguments)
        "use_peft": Refusal(LORA, "tensor_model_parallel_size", (False,)),
        "peft_config": Refusal(LORA, "tensor_model_parallel_size", (None,)),
        "quantization_config": Refusal(_QUANT, "bf16", (None,)),
        "load_in_8bit": Refusal(_QUANT, "bf16", (False,)),
        "load_in_4bit": Refusal(_QUANT, "bf16", (False,)),
    }
    | {
        # What TRL's ModelConfig says of quantization and adapters says nothing while they are off.
        name: Refusal(_QUANT, "bf16", (default,))
        for name, default in {
            "bnb_4bit_quant_type": "nf4",
            "use_bnb_nested_quant": False,
            "bnb_4bit_quant_storage": None,
        }.items()
    }
    | {
        name: Refusal(LORA, "tensor_model_parallel_size", (default,))
        for name, default in {
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "lora_target_modules": None,
            "lora_target_parameters": None,
            "lora_modules_to_save": None,
            "lora_task_type": "CAUSAL_LM",
            "use_rslora": False,
            "use_dora": False,
        }.items()
    }
)

# Entries of model_init_kwargs beside dtype.
MODEL_INIT: Mapping[str, Refusal] = {
    "revision": TRAINING["model_revision"],
    "trust_remote_code": TRAINING["trust_remote_code"],
    "attn_implementation": TRAINING["attn_implementation"],
    "quantization_config": TRAINING["quantization_config"],
    "use_cache": TRAINING["use_cache"],
    "device_map": Refusal("each rank reads its own slices", "tensor_model_parallel_size", (None, "auto")),
    "low_cpu_mem_usage": Refusal("each rank reads its own slices", "tensor_model_parallel_size", (None, True)),
}
