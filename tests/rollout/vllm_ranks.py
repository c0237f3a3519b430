"""What the ranks of test_vllm_engine.py do: one vLLM start for each layout, many observations in it."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalign.config import GRPOConfig
from megalign.device import on_cuda, resident_bytes
from megalign.errors import UserError
from megalign.parallel.groups import initialize
from megalign.rollout.engine import GenerationParams, awake
from megalign.rollout.redistribute import redistribute

PROMPTS = [[1, 5 + i, 17, 40 + 3 * i] for i in range(7)]  # 7: no layout divides it
KV_CACHE_BYTES = 64 << 20
SEEDS = [100 + i for i in range(7)]


def weights_of(path: str, seed: int) -> dict[str, torch.Tensor]:
    """The directory's tensors with noise of this seed: a policy after some steps."""
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(os.path.join(path, "model.safetensors")).items()
    }


def observe(path: str, vllm_tp: int) -> dict[str, Any]:
    """Everything the tests of one layout look at; the same calls on every rank."""
    from megalign.rollout.vllm_engine import VllmEngine

    args = GRPOConfig(
        vllm_tensor_parallel_size=vllm_tp,
        vllm_max_model_length=128,
        vllm_enable_sleep_mode=True,
        vllm_cpu_kv_cache_gib=KV_CACHE_BYTES / 2**30,
        vllm_gpu_memory_utilization=0.1,
        vllm_structured_outputs_regex="[ab]+c",  # makes the engine load the tokenizer
        bf16=False,
    )
    groups = initialize(args)
    before = _process_state()
    seen: dict[str, Any] = {"seconds": {}}
    timed = _timer(seen["seconds"])
    with timed("start"):
        engine = VllmEngine(path, args, groups)
    seen["state_kept"] = before == _process_state()
    seen["num_replicas"] = engine.num_replicas

    def sample(**changes: Any) -> list[Any]:
        params = GenerationParams(**{"max_tokens": 12, **changes})
        return engine.generate(PROMPTS, params, SEEDS, 3)

    seen["before_weights"] = _error_of(sample)
    with timed("update"):
        engine.update_weights(weights_of(path, 1).items())
    with timed("first_generate"):
        seen["first"] = sample(temperature=0.7)
    with timed("generate"):
        seen["again"] = sample(temperature=0.7)
    seen["state_kept_by_generate"] = before == _process_state()
    engine.update_weights(weights_of(path, 2).items())
    seen["second"] = sample()
    seen["everyone"] = redistribute(seen["second"], engine, groups)
    seen["two_prompts"] = redistribute(
        engine.generate(PROMPTS[:1], GenerationParams(max_tokens=3), SEEDS[:1], 0), engine, groups
    )
    eos = seen["second"][0].completion_ids[3]
    seen["eos"] = eos
    seen["stopped"] = sample(stop_token_ids=(eos,))
    always_eos = {"logit_bias": {2: 100.0}}
    seen["at_eos"] = sample(stop_token_ids=(7,), extra=always_eos)
    seen["past_eos"] = sample(stop_token_ids=(7,), extra={"ignore_eos": True, **always_eos})
    seen["greedy_by_top_k"] = sample(top_k=1)
    seen["top_p"] = sample(top_p=0.5)
    seen["min_p"] = sample(min_p=0.3)
    seen["penalty"] = sample(repetition_penalty=1.5)
    seen["extra"] = sample(extra={"allowed_token_ids": [7, 8]})
    seen["regex"] = sample(structured_outputs_regex="[ab]+c")
    seen["unknown_extra"] = _error_of(lambda: sample(extra={"presence_penality": 1.0}))
    seen["owned_extra"] = _error_of(lambda: sample(extra={"temperature": 1.0}))
    seen["bad_value"] = _error_of(lambda: sample(extra={"presence_penalty": 9.0}))
    seen["too_long"] = _error_of(lambda: engine.generate([[1] * 128], GenerationParams(max_tokens=1), [0], 0))
    seen["missing"] = _error_of(lambda: engine.update_weights(list(weights_of(path, 2).items())[1:]))

    engine.update_weights(weights_of(path, 2).items())
    _touch_kv_cache(engine)
    (seen["weights_and_cache"],) = engine._llm.collective_rpc(_weights_and_cache)
    seen["resident_awake"] = _held_bytes()
    with timed("sleep"):
        engine.sleep()
    seen["resident_asleep"] = _held_bytes()
    seen["asleep"] = _error_of(sample)
    with awake(engine, "weights"):
        engine.update_weights(weights_of(path, 2).items())
    seen["half_asleep"] = _error_of(sample)
    with awake(engine):
        seen["after_sleep"] = sample()
    seen["asleep_again"] = sorted(engine._asleep)
    seen["shared_memory"] = _segments()
    return seen


def _weights_and_cache(worker: Any) -> int:
    """Bytes that the worker's tensors take."""
    tensors = [*worker.model_runner.model.parameters(), *worker.model_runner.kv_caches]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _held_bytes() -> int:
    """By this process, or of the GPU by anybody: vLLM's sleeping memory does not leave torch's count."""
    if not on_cuda():
        return resident_bytes()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _segments() -> list[str]:
    """Names of the tensor-parallel segments of this job's vLLM, which knows the job by a name on CPUs only."""
    job = os.environ.get("VLLM_DIST_IDENT")
    return [name for name in os.listdir("/dev/shm") if job is not None and name.startswith(f"{job}-")]


def _touch_kv_cache(engine: Any) -> None:
    """As long use would: a fresh cache is address space without memory."""
    engine._llm.collective_rpc(lambda worker: [cache.fill_(1) for cache in worker.model_runner.kv_caches])
    engine._llm.reset_prefix_cache()


def _process_state() -> list[Any]:
    return [
        torch.get_num_threads(),
        id(torch.set_num_threads),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        id(dist.group.WORLD),
        dist.get_world_size(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    ]


def _error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (UserError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _timer(into: dict[str, float]) -> Callable[[str], Any]:
    @contextlib.contextmanager
    def timed(name: str) -> Any:
        start = time.perf_counter()
        yield
        into[name] = time.perf_counter() - start

    return timed
