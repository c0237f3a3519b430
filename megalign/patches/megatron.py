"""What Megatron-Core 0.16-0.19 needs to run on CPU and gloo and without Transformer Engine; repairs of its checkpoints.

Upstream lines are named as 0.16.1's / 0.19.2's; a patch that only one of them needs says so.

`install()` once a process: without a GPU it replaces torch.cuda's functions for good. `megatron_calls()` goes
around every call into Megatron (schedules, optimizer, model construction): its look at every torch call is paid
there only, not by vLLM in the same process. Importing this module silences Megatron's known warnings, some of which
come while it is imported: the packages that import Megatron (parallel, model) import this one first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import queue
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megalign import ops
from megalign.device import on_cuda
from megalign.forked import Result
from megalign.patches.unpickling import unpickle_data_only

_installed = False


def _silence(*known: tuple[str, type[Warning]]) -> None:
    """Hides the warnings that begin like this; whatever is not listed is shown."""
    for start, category in known:
        warnings.filterwarnings("ignore", message=re.escape(start), category=category)


def _silence_logs(*known: tuple[str, str]) -> None:
    """Hides what the logger of that name says when it begins like this."""
    for name, start in known:
        logging.getLogger(name).addFilter(lambda record, start=start: not record.getMessage().startswith(start))


# Said on every rank, module by module, of what is chosen here: plain torch where Transformer Engine and Apex are not
# used. The calls of torch's that are old are upstream's to renew.
_silence(
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed. Falling back to Torch Norm", UserWarning),
    ("If you are using transformer_engine as the transformer implementation", UserWarning),
    ("full scope is deprecated. Use empty cuda_graph_", UserWarning),  # transformer_config.py:1705/2415, by default
    ("MimoModelConfig is experimental", UserWarning),  # 0.19.2's optimizer imports it
    ("The .grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),  # optimizer.py:66
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning),
    ("Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    # Checkpoints, strategies/torch.py: 0.16.1's call of torch's at :799; 0.19.2's at :979, which loads rank by rank.
    ("`load_state_dict` is deprecated and will be removed in future versions", FutureWarning),
    ("The argument order of load has been changed", UserWarning),
    ("torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load", UserWarning),
)
# 0.19.2's: 0.16 has no HybridModel; DDP makes the layout itself when it is given none, which 0.16 always does; a
# synchronous save goes through the code of the asynchronous one.
_silence_logs(
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
)


def _import_without_compiler() -> None:
    """jit.py:21 hands Megatron's fusions to torch.compile as they are imported: a second of a start. On a CPU they run
    as they are written."""

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return as_it_is if function is None else function

    compile_function, torch.compile = torch.compile, as_it_is
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_function


if not on_cuda():
    _import_without_compiler()


def install() -> None:
    """Applies the patches; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _repair_optimizer_checkpoints()
    _number_parameters_of_two_dtypes()
    _save_without_helper_processes()
    unpickle_data_only()
    _recompute_without_transformer_engine()
    _do_without_transformer_engine()
    if not on_cuda():
        _replace_cuda_functions()
        _replace_rng_tracker_state()
        _send_uneven_parts_over_gloo()
        _add_gradients_on_a_cpu()
        # tensor_parallel/layers.py:738/856; good advice on a GPU.
        _silence(("When using async grad allreduce it is recommended to set the environment variable", UserWarning))


@contextlib.contextmanager
def megatron_calls() -> Iterator[None]:
    """Redirects Megatron's device="cuda" literals to the CPU when there is no GPU."""
    if on_cuda():
        yield
        return
    with _CudaLiteralsMeanCpu():
        yield


class _CudaLiteralsMeanCpu(TorchFunctionMode):
    """schedules.py:596,983,2138/749,1121,2292 and clip_grads.py:90,174/96,180 name device="cuda".

    Goes when upstream takes a device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # rope_utils.py:62 pins, for the copy to a GPU
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # distrib_optimizer.py:361/401 and optimizer.py:671/1008 compare this string to tell dtypes apart.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _NoStream:
    """Stands in for torch.cuda.Stream, Event and the contexts around them: a CPU has one queue."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> bool:
        return False

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *args: Any) -> _NoStream:
        return _NoStream()

    def query(self) -> bool:
        return True


def _replace_cuda_functions() -> None:
    """p2p_communication.py:190/211 and many more call these unconditionally; goes with a CPU backend upstream."""
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = cuda.stream = cuda.device = _NoStream
    cuda.current_stream = cuda.default_stream = _NoStream
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _replace_rng_tracker_state() -> None:
    """tensor_parallel/random.py:41,72/104,135 reach into torch.cuda's generators; goes with a CPU backend upstream."""
    import megatron.core.tensor_parallel.random as tracker

    _replace(tracker, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(tracker, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))


def _replace(module: Any, name: str, function: Any) -> None:
    # A name that upstream has given up would be set without effect.
    assert hasattr(module, name), f"megatron-core has no {module.__name__}.{name} any more"
    setattr(module, name, function)


def _repair_optimizer_checkpoints() -> None:
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


def _save_without_helper_processes() -> None:
    """dist_checkpointing/strategies/filesystem_async.py: a rank that is killed would leave its helpers behind.

    (1) :51/53 starts a manager process for the results of a save; here they come through a file without a name.
    (2) :225 forks a process for each file (0.16.1; 0.19.2 has threads there). A save in the background is in a
    process of its own already, which ends with its rank. Goes when upstream has neither.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # 0.19 calls it by a public name.
    name = "get_write_results_queue"
    name = name if hasattr(filesystem_async, name) else f"_{name}"
    _replace(filesystem_async, name, lambda *args: Result())
    writer = filesystem_async.FileSystemWriterAsync
    if hasattr(writer, "write_preloaded_data_multiproc"):
        writer.write_preloaded_data_multiproc = staticmethod(_write_in_threads)


def _write_in_threads(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Result) -> None:
    """In place of FileSystemWriterAsync.write_preloaded_data_multiproc: puts {bucket's number: what was written}, or
    the exception that stopped a bucket."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(numbered: tuple[int, Any]) -> tuple[int, Any]:
        written: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(numbered[0])
        FileSystemWriterAsync.write_preloaded_data(
            transforms, *numbered, results_queue=written, count_queue=running, use_fsync=True, use_msc=use_msc
        )
        return written.get_nowait()

    with ThreadPoolExecutor(max(1, len(buckets))) as pool:
        parts = dict(pool.map(write, enumerate(buckets)))
    failures = [part for part in parts.values() if isinstance(part, Exception)]
    results.put(failures[0] if failures else parts)


def _recompute_without_transformer_engine() -> None:
    """tensor_parallel/random.py:636 takes fp8=False, its default, for FP8 and asks Transformer Engine, here or not.

    It is what recomputes norms. Goes when upstream tests the value.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    initialize = CheckpointWithoutOutput.__init__

    @functools.wraps(initialize)
    def initialize_by_value(self: Any, fp8: Any = None, *args: Any, **kwargs: Any) -> None:
        initialize(self, fp8 or None, *args, **kwargs)

    CheckpointWithoutOutput.__init__ = initialize_by_value


def _number_parameters_of_two_dtypes() -> None:
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


def _do_without_transformer_engine() -> None:
    """Where modules take its absence for its presence (0.16.1).

    (1) moe_utils.py:1192 asks whether te_general_gemm is None; :34 imports it with Transformer Engine only.
    (2) multi_latent_attention.py:56 takes the stand-in of extensions/transformer_engine.py:84 for the real one, and
    :185 asks for instances of it. Both go with upstream's repairs.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not transformer_engine.HAVE_TE:
        multi_latent_attention.HAVE_TE = False
    else:
        _add_gradients_without_apex()
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _add_gradients_without_apex() -> None:
    """tensor_parallel/layers.py:924/1070 refuses gradient_accumulation_fusion without Apex's kernel, to the head too.

    Transformer Engine's linears add their gradients up themselves, and the head is a function of its weight here
    (model.heads), no module that is called. Goes when upstream asks where the kernel is used.
    """
    from megatron.core.tensor_parallel import layers

    _replace(layers, "_grad_accum_fusion_available", True)


def _add_gradients_on_a_cpu() -> None:
    """layers.py:569/680 calls Apex's kernel, for which a product of ours stands in; buffers are fp32
    (model.optimizer)."""
    from megatron.core.tensor_parallel import layers

    def add(given: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        ops.add_product_(main_grad, grad_output.t(), given)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add)
    _add_gradients_without_apex()


def _send_uneven_parts_over_gloo() -> None:
    """Ranks of an expert have different numbers of tokens, which gloo's collectives do not take as they are called.

    (1) token_dispatcher.py:666,669,810 give all_to_all their split sizes as tensors; gloo wants lists.
    (2) mappings.py:144 all_gather and :185 reduce_scatter of tensors of different lengths: gloo refuses them. Here
    they are padded to the longest, and reduced whole. Goes when gloo takes uneven parts.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    all_to_all = mappings.all_to_all
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(all_to_all)
    def all_to_all_of_lists(
        group: Any, tensor: torch.Tensor, output: Any = None, input: Any = None, **rest: Any
    ) -> Any:
        return all_to_all(group, tensor, _as_list(output), _as_list(input), **rest)

    @functools.wraps(gather)
    def gather_uneven(tensor: torch.Tensor, group: Any, sizes: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(tensor, group, sizes, *args, **kwargs)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_uneven(
        tensor: torch.Tensor, group: Any, sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(tensor, group, sizes, *args, **kwargs)
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    token_dispatcher.all_to_all = all_to_all_of_lists
    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
