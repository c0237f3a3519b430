"""What checkpoints hold of the distributed optimizer (distrib_optimizer.py): every parameter's own state."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


def repair_optimizer_checkpoints() -> None:
    """Distributed-optimizer checkpoints (distrib_optimizer.py) with torch's AdamW: no Transformer Engine, no Apex.

    (1) `_set_main_param_and_optimizer_states` (:911/1193) looks up "step" in tensors that do not carry it: KeyError.
    (2) `load_state_dict` (:825/1032) leaves ONE step tensor shared by all parameters, which then advances once for
    each parameter. Both go when upstream keeps step per parameter.
    (3) `get_parameter_state_dp_zero` (:1113/1399) closes the gaps between buckets, but its reader (:1501/1790) slices
    by places that include them: a parameter behind a gap is saved shifted, the last one cut. A tied embedding under
    pipeline parallelism is a bucket of its own. Goes when upstream keeps the gaps.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(set_states)
    def set_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    gather = DistributedOptimizer.get_parameter_state_dp_zero

    @functools.wraps(gather)
    def gather_with_gaps(self: Any, *args: Any, **kwargs: Any) -> Any:
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
            buffer.numel_unpadded = buffer.numel
        if self.data_parallel_group.size() == 1 and not kwargs.get("empty_data"):
            return _state_of_one_replica(self)
        return gather(self, *args, **kwargs)

    DistributedOptimizer.get_parameter_state_dp_zero = gather_with_gaps
    DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(set_with_step)
    DistributedOptimizer.load_state_dict = load_with_own_steps


def _state_of_one_replica(optimizer: Any) -> dict[Any, Any]:
    """What get_parameter_state_dp_zero returns, by one copy."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, by_dtype) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
        ((dtype, buckets),) = by_dtype.items()
        whole: dict[str, Any] = {}
        start = 0
        for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
            for parameter, places in ranges["param_map"].items():
                here = slice(start + places["gbuf_local"].start, start + places["gbuf_local"].end)
                for name, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items():
                    if name == "step":
                        continue
                    if name not in whole:  # gaps stay 0, and cost nothing until something is written there
                        whole[name] = torch.from_numpy(np.zeros(buffer.numel, dtype=np.float32))
                    whole[name][here].copy_(tensor.detach())
            start += bucket.grad_data.numel()
        state[number] = {dtype: {**whole, "numel_unpadded": buffer.numel}}
    return state


def number_parameters_of_two_dtypes() -> None:
    """distrib_optimizer.py:441/487 puts a group's fp32 parameters before the others', behind the back of the table of
    their places (:297/337): a checkpoint of a bf16 model with an fp32 head took one's state for another's.

    Goes when upstream numbers them as it orders them.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    build = DistributedOptimizer._build_optimizer_group_ranges.__func__

    @functools.wraps(build)
    def build_as_ordered(cls: Any, *args: Any, **kwargs: Any) -> Any:
        places, groups = build(cls, *args, **kwargs)
        for number, group in enumerate(groups):
            ordered = sorted(group["params"], key=lambda parameter: parameter.dtype is not torch.float32)
            places.update({parameter: (number, place) for place, parameter in enumerate(ordered)})
        return places, groups

    DistributedOptimizer._build_optimizer_group_ranges = classmethod(build_as_ordered)
