"""Megatron's data parallelism and AdamW around the model chunks; numerically transformers' AdamW."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, ParamWithNamePredicate, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor, nn

from megalign.model.overlap import overlapping, reduce_in_last_microbatch
from megalign.patches.megatron import megatron_calls

if TYPE_CHECKING:
    from megalign.config import LoopConfig
    from megalign.parallel.groups import ParallelGroups


def wrap_for_training(chunks: list[nn.Module], args: LoopConfig, groups: ParallelGroups) -> list[nn.Module]:
    """Megatron's DDP: fp32 gradient buffers, reduced over data-parallel ranks once a step."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
        **overlapping(args, groups),
    )
    config = chunks[0].config  # one for all chunks
    with megatron_calls():
        # Later chunks' gradients are ready first, all at once: buckets would only cut them up.
        wrapped = [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
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
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    with megatron_calls():
        optimizer = get_megatron_optimizer(config, chunks, {_NOT_DECAYED: ParamGroupOverride(wd_mult=0.0)})
    _find_what_is_not_finite(optimizer)
    return optimizer


def _is_not_decayed(parameter: Tensor, name: str) -> bool:
    """Megatron's own rule, but for attention sinks: transformers goes by names, and theirs is no norm's or bias's."""
    return (parameter.ndim == 1 or name.endswith(".bias")) and not name.endswith(".softmax_offset")


_NOT_DECAYED = ParamKey(with_name_predicate=ParamWithNamePredicate(name="not_decayed", fn=_is_not_decayed))


def _find_what_is_not_finite(optimizer: MegatronOptimizer) -> None:
    """Makes Megatron skip a step whose gradient norm is not finite, as it does with a loss scaler's.

    Of fp32 and bf16 Megatron looks at no gradient before it scales each by 1 / inf. The norm is of all ranks, so that
    all decide alike; it is asked for once.
    """
    prepare, measure = optimizer.prepare_grads, optimizer.get_grad_norm
    norm = math.nan

    def prepare_grads() -> bool:
        nonlocal norm
        found_inf = prepare()
        norm = float(measure())
        return found_inf or not math.isfinite(norm)

    optimizer.prepare_grads, optimizer.get_grad_norm = prepare_grads, lambda: norm


def zero_gradients(chunks: list[nn.Module], optimizer: MegatronOptimizer) -> None:
    """Clears DDP's buffers and the optimizer's own gradients."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def step(optimizer: MegatronOptimizer, learning_rate: float) -> tuple[float, bool]:
    """One clipped AdamW step: the gradient norm before clipping, and whether weights and state were changed by it."""
    config = optimizer.config
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
        # Megatron's groups only carry the multiplier; its own scheduler, which we do not use, applies it.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        # A resumed run's are its own, not the checkpoint's.
        group["betas"], group["eps"] = (config.adam_beta1, config.adam_beta2), config.adam_eps
        if "fused" in group:  # torch's AdamW, in one pass over memory instead of eight; NVIDIA's have no such word
            group["fused"] = True
    _count_steps_on_the_device(optimizer)
    with megatron_calls():
        succeeded, _, _ = optimizer.step()
    return optimizer.get_grad_norm(), succeeded


def _count_steps_on_the_device(optimizer: MegatronOptimizer) -> None:
    """Where torch's fused AdamW reads them: those of a checkpoint, or made by `adam_states`, are on the host."""
    for chained in optimizer.chained_optimizers:
        for parameter, state in chained.optimizer.state.items() if chained.optimizer is not None else ():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)


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
