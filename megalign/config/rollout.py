"""How completions are sampled: TRL's sampling and vLLM fields."""

from __future__ import annotations

from typing import Any

from megalign.config.base import Config, config
from megalign.config.values import option
from megalign.errors import UserError


@config
class RolloutConfig(Config):
    """Sampling, and vLLM inside the training ranks."""

    temperature: float = option(1.0, minimum=0.01)
    """Sampling temperature; the trainer's logprobs use the same (vLLM samples no colder)."""
    top_p: float = option(1.0, above=0, maximum=1)
    """Sample from the most probable tokens that together have this probability; 1 is off."""
    top_k: int = option(0, minimum=-1)
    """Sample from this many most probable tokens; 0 (or -1) is off."""
    min_p: float | None = option(None, minimum=0, maximum=1)
    """Drop tokens less probable than this times the most probable one's probability."""
    repetition_penalty: float = option(1.0, above=0)
    """Above 1 makes tokens of the prompt and the answer so far less likely; 1 is off."""
    generation_kwargs: dict[str, Any] | None = None
    """Further fields of vLLM's SamplingParams by name, e.g. {"stop": ["\\n"], "presence_penalty": 0.1}."""
    max_completion_length: int = option(512, minimum=1)
    """Longest completion, in tokens."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template, e.g. {"enable_thinking": false}."""

    use_vllm: bool = option(
        True, choices=(True,), why="completions are always sampled by vLLM, nearest is vllm_mode='colocate'"
    )
    """Sample with vLLM. TRL's default is False (transformers' generate), which is not built."""
    vllm_mode: str = option(
        "colocate",
        choices=("colocate",),
        why="a separate vLLM server is not built yet, nearest is vllm_tensor_parallel_size",
    )
    """Where vLLM runs: inside the training ranks."""
    vllm_tensor_parallel_size: int = option(1, minimum=1)
    """Consecutive ranks that share one vLLM replica; must divide the world size."""
    vllm_enable_expert_parallel: bool = False
    """Split a replica's experts over its ranks whole (vLLM's enable_expert_parallel) instead of slicing each one."""
    vllm_gpu_memory_utilization: float = option(0.3, above=0, maximum=1)
    """Share of each GPU's memory that vLLM may use (weights and KV cache)."""
    vllm_max_model_length: int | None = option(None, minimum=2)
    """Longest prompt plus completion, in tokens; the model's own limit when not given."""
    vllm_enable_sleep_mode: bool = False
    """Hand the memory over: vLLM gives its memory back while the policy trains, and the policy while vLLM
    samples."""
    vllm_structured_outputs_regex: str | None = None
    """Regular expression that every completion must match."""
    vllm_model_impl: str = option("vllm", choices=("vllm", "transformers"))
    """vLLM's model code: its own, or transformers'."""
    vllm_timeout: float | None = option(1500.0, above=0)
    """Seconds that vLLM may take for one sampling. An engine that takes longer, or raises, is started anew once in a
    run, with the policy's weights, and samples the same again (vllm_restarts in the metrics counts it); the second
    failure ends the run with its cause. None sets no limit. What never returns to Python, a kernel or a collective
    whose other ranks are gone, is not interrupted by it but by ddp_timeout."""
    vllm_cpu_kv_cache_gib: float = option(1.0, above=0)
    """On CPU: GiB of KV cache a rank (vllm_gpu_memory_utilization has no meaning there)."""

    def validate(self, world_size: int) -> None:
        """vLLM's replicas and lengths."""
        super().validate(world_size)
        if world_size % self.vllm_tensor_parallel_size:
            raise UserError(
                f"vllm_tensor_parallel_size {self.vllm_tensor_parallel_size} must divide the world size {world_size}; "
                "use one of its divisors"
            )
        if self.vllm_enable_expert_parallel and self.vllm_tensor_parallel_size == 1:
            raise UserError(
                "vllm_enable_expert_parallel=True needs a vllm_tensor_parallel_size above 1: a replica's experts are "
                "split over its ranks; raise the size or leave the option out"
            )
        limit = self.vllm_max_model_length
        if limit is not None and limit <= self.max_completion_length:
            raise UserError(
                f"vllm_max_model_length {limit} must exceed max_completion_length {self.max_completion_length} to "
                "leave room for the prompt; raise it or shorten the completions"
            )


@config
class CorrectionConfig(Config):
    """Weighing tokens for the difference between vLLM's probabilities and the trainer's."""

    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by the trainer's probability over vLLM's, which differ a little in numerics."""
    vllm_importance_sampling_mode: str = option(
        "sequence_mask", choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    )
    """Ratio per token or per sequence; truncate clips it into the range below, mask drops what is outside."""
    vllm_importance_sampling_clip_max: float | None = option(3.0, above=0)
    """Upper end of the ratio's range; None is open."""
    vllm_importance_sampling_clip_min: float | None = option(None, minimum=0)
    """Lower end of the ratio's range; None is open."""

    def validate(self, world_size: int) -> None:
        """The importance ratio's range."""
        super().validate(world_size)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise UserError(
                f"vllm_importance_sampling_clip_min {low} must be below vllm_importance_sampling_clip_max {high}; "
                "lower the first or raise the second"
            )
        if self.vllm_importance_sampling_correction and low is None and high is None:
            raise UserError(
                "vllm_importance_sampling_clip_max=None with no vllm_importance_sampling_clip_min corrects without a "
                "bound; give one of them, or vllm_importance_sampling_correction=False"
            )
