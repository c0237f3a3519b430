"""What vLLM 0.32 needs to live in a training rank: the job's groups stay; on a CPU real sleep, new weights for tied
heads and experts, experts over ranks.

`install()` before the first LLM of the process. On CUDA nothing but the launcher's identity and an engine's end is
touched.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from megalign.device import device, on_cuda, release_memory
from megalign.errors import UserError

_PAGE = 4096
_MADV_DONTNEED = 4  # linux/mman.h


def install(job: str, rank: int) -> None:
    """Applies the patches; `job` must be one string for all ranks and differ between jobs."""
    _name_the_job(job, rank)
    _leave_groups_alone()
    if not on_cuda():
        from vllm.v1.worker.cpu_worker import CPUWorker

        CPUWorker.sleep = _sleep
        CPUWorker.wake_up = _wake_up
        _pack_experts_at_every_reload()
        _find_experts_of_this_rank()
        _rotate_every_head()


def _name_the_job(job: str, rank: int) -> None:
    """uniproc_executor.py:196 names no job: cpu_worker.py:148 then calls the shared memory of every job "//".

    Two jobs on one machine would meet in one segment. What follows the last colon becomes the name; the host
    is in it so that a tensor-parallel group over two hosts does not believe it shares memory. Goes when the
    external launcher takes an identity.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    address = f"env://:{job}-{socket.gethostname()}"
    distributed_args = ExecutorWithExternalLauncher._distributed_args

    def with_identity(self: Any) -> tuple[str, int, int]:
        _, environment_rank, local_rank = distributed_args(self)
        assert environment_rank == rank, f"RANK={environment_rank} but this is rank {rank} of the job"
        # vLLM takes the local rank for the GPU's index, which is another one where each rank sees but one GPU.
        return address, rank, device().index if on_cuda() else local_rank

    ExecutorWithExternalLauncher._distributed_args = with_identity


def _leave_groups_alone() -> None:
    """core.py:839 ends the default process group with an engine, which Python collects when it likes.

    The group is the job's: the next trainer of the script needs it, and the next engine vLLM's own, which all engines
    of a process share. Goes when an engine ends what it has started and nothing else.
    """
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = release_memory


@functools.cache  # once, however many engines the process starts
def _pack_experts_at_every_reload() -> None:
    """unquantized_fused_moe_method.py:191 packs experts for the CPU's kernel at the first load only.

    A reload then writes plain rows where the kernel reads packed ones: a model that answers, and wrongly. Goes
    when `_setup_kernel` calls the experts' process_weights_after_loading on weight updates as well.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    setup_kernel = UnquantizedFusedMoEMethod._setup_kernel

    def with_packing(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_reload = self.moe_kernel is not None
        setup_kernel(self, layer, w13, w2)
        if is_reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = with_packing


@functools.cache
def _find_experts_of_this_rank() -> None:
    """experts/cpu_moe.py:303 hands the experts' numbers in the model to a kernel that counts this rank's alone.

    With expert parallelism it would read past the weights. Experts of other ranks get weight 0 here; vLLM sums the
    ranks' outputs itself. Goes when CPUUnquantizedExperts.apply uses its expert_map.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    signature = inspect.signature(apply)

    @functools.wraps(apply)
    def with_own_experts(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        if given["expert_map"] is not None:
            local = given["expert_map"][given["topk_ids"].long()]  # -1: of another rank
            given["topk_weights"] = given["topk_weights"].masked_fill(local < 0, 0.0)
            given["topk_ids"] = local.clamp(min=0).to(torch.int32)
        apply(*bound.args, **bound.kwargs)

    CPUUnquantizedExperts.apply = with_own_experts


@functools.cache
def _rotate_every_head() -> None:
    """rotary_embedding/base.py:310 gives latent attention's [T, heads, dim] to a kernel that reads [T, heads * dim].

    The kernel takes such a query for one head and rotates the wrong numbers, silently; rope with a scaling has
    another way and is right. Goes when forward_cpu flattens the heads.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    forward_cpu = RotaryEmbedding.forward_cpu

    def with_flat_heads(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if query.dim() == 2:
            return forward_cpu(self, positions, query, key)
        flat_key = None if key is None else key.flatten(1)
        query_out, key_out = forward_cpu(self, positions, query.flatten(1), flat_key)
        return query_out.view_as(query), None if key is None else key_out.view_as(key)

    RotaryEmbedding.forward_cpu = with_flat_heads


def check_groups(model: str) -> None:
    """distributed/parallel_state.py makes a group for experts with a process's first engine, if its model has some.

    The groups are every later engine's too; without one, models/mixtral.py:96 and the like end in an assertion.
    """
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        raise UserError(
            f"{model} has experts, but vLLM began with a dense model in this process and has no groups for them; "
            "start it first or in a process of its own"
        )


def check_head_sizes(worker: Any) -> None:
    """Each attention layer's head size against its backend's list, which nothing asks for on a CPU.

    cpu_attn.py:69 and mla/cpu_mla.py:61: the first prompt would fail in the kernel.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    for layer in worker.model_runner.model.modules():
        if not isinstance(layer, AttentionLayerBase):
            continue
        backend = layer.get_attn_backend()
        if not backend.supports_head_size(layer.head_size):
            what = "kv_lora_rank + qk_rope_head_dim" if backend.is_mla() else "head_dim"
            sizes = backend.get_supported_head_sizes()
            raise UserError(
                f"{what} {layer.head_size} must be one of {sizes} for vLLM on a CPU; use another model or a GPU"
            )


def unlink_shared_memory(job: str) -> None:
    """Removes the names of the tensor-parallel segments, once every rank of the job has mapped them.

    csrc/cpu/shm.cpp unlinks them in a destructor, which a killed rank does not reach: /dev/shm would fill up.
    """
    for segment in Path("/dev/shm").glob(f"{job}-*"):
        segment.unlink(missing_ok=True)


def repack_tied_weights(worker: Any) -> None:
    """Packs a tied head anew after a reload, on CPU.

    A tied lm_head shares its parameter with the embedding but keeps a oneDNN copy of its own
    (model_executor/layers/utils.py:587), which reload/layerwise.py:234 leaves as it was: the head would
    answer with the weights of start-up, silently. Goes when reloading handles tied parameters.
    """
    owners: set[int] = set()
    for module in worker.model_runner.model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not hasattr(module, "cpu_linear"):
            continue
        if id(weight) in owners:
            module.quant_method.process_weights_after_loading(module)
        owners.add(id(weight))


def _sleep(self: Any, level: int = 1) -> None:
    """cpu_worker.py:184 ignores sleep. Here (level 2) weights and KV cache give their pages back.

    The address space stays, so waking allocates nothing and no view is left dangling; pages read as zeros
    until the reload writes them. The oneDNN copies go for good: a reload makes new ones. Buffers stay: rotary
    tables are not reloaded. Goes when upstream sleeps on CPU.
    """
    assert level == 2, f"sleep level {level} is not there on CPU"
    for module in self.model_runner.model.modules():
        if hasattr(module, "cpu_linear"):
            module.cpu_linear = _asleep
    for storage in _storages(self.model_runner):
        _give_back(storage)
    ctypes.CDLL(None).malloc_trim(0)


def _wake_up(self: Any, tags: list[str] | None = None) -> None:
    """The counterpart of `_sleep`: pages come back as they are touched."""


def _asleep(*args: Any) -> NoReturn:
    raise AssertionError("vLLM's weights are asleep; update_weights comes after wake")


def _storages(runner: Any) -> Iterator[torch.UntypedStorage]:
    seen: set[int] = set()
    for tensor in [*runner.model.parameters(), *runner.kv_caches]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage


def _give_back(storage: torch.UntypedStorage) -> None:
    """Drops the whole pages inside a storage; the ragged ends stay."""
    start = -(-storage.data_ptr() // _PAGE) * _PAGE
    end = (storage.data_ptr() + storage.nbytes()) // _PAGE * _PAGE
    if end <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
    assert not failed, f"madvise failed with errno {ctypes.get_errno()}"
