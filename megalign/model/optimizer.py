"""Megatron's data parallelism and AdamW around the model chunks; numerically transformers' AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megalign.errors import UserError
from megalign.model.overlap import reduce_in_last_microbatch
from megalign.patches.megatron import megatron_calls

if TYPE_CHECKING:
    from megalign.config import LoopConfig


def wrap_for_training(chunks: list[nn.Module], args: LoopConfig) -> list[nn.Module]:
    """Megatron's DDP: fp32 gradient buffers, reduced over data-parallel ranks once a step."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
    )
    config = chunks[0].config  # one for all chunks
    with megatron_calls():
        # Later chunks' gradients are ready first, all at once: buckets would only cut them up.
        wrapped = [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        reduce_in_last_microbatch(config, wrapped)
    return wrapped


def build_optimizer(chunks: list[nn.Module], args: LoopConfig) -> MegatronOptimizer:
    """AdamW over fp32 (master) weights; weight decay skips biases and norms, as transformers' Trainer does."""
    dtype = next(chunks[0].parameters()).dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_epsilon,
        clip_grad=args.max_grad_norm,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
    )
    with megatron_calls():
        optimizer = get_megatron_optimizer(config, chunks)
    optimizer.get_grad_norm = partial(_checked_norm, optimizer.get_grad_norm)
    return optimizer


def _checked_norm(norm: Callable[[], float]) -> float:
    """Megatron asks for it between backward and update, and would scale every gradient by 1 / inf."""
    value = float(norm())
    if not math.isfinite(value):
        raise UserError(
            f"the gradient norm of the step is {value}, so no weight was changed; find what overflows in the "
            "step's rows or rewards, or lower learning_rate"
        )
    return value


def zero_gradients(chunks: list[nn.Module], optimizer: MegatronOptimizer) -> None:
    """Clears DDP's buffers and the optimizer's own gradients."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def step(optimizer: MegatronOptimizer, learning_rate: float) -> float:
    """One clipped AdamW step; returns the gradient norm before clipping."""
    config = optimizer.config
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
        # Megatron's groups only carry the multiplier; its own scheduler, which we do not use, applies it.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        # A resumed run's are its own, not the checkpoint's.
        group["betas"], group["eps"] = (config.adam_beta1, config.adam_beta2), config.adam_eps
    with megatron_calls():
        succeeded, grad_norm, _ = optimizer.step()
    assert succeeded, "only fp16 loss scaling can skip a step, and megalign has none"
    return float(grad_norm)


def adam_states(optimizer: MegatronOptimizer) -> list[dict[str, Tensor]]:
    """AdamW's state of each parameter that this rank updates, filled with zeros before the first step.

    torch's counts the steps of each parameter there; the fused ones of NVIDIA's libraries count in the group.
    """
    states = []
    for chained in optimizer.chained_optimizers:
        inner = chained.optimizer
        if inner is None:  # a rank whose shard is empty
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state:
                    if isinstance(inner, torch.optim.Adam):  # AdamW is one
                        state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                states.append(state)
    return states
