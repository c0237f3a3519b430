"""GRPO jobs inside test ranks, with a stand-in for vLLM that draws random tokens from each completion's seed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megalign.batch import Completion
from megalign.config import GRPOConfig
from megalign.rollout.engine import GenerationParams
from tests.tiny import save_tiny_model
from tests.trainers.runs import Recorder, digest


def save_model_with_tokenizer(path: Path, family: str = "llama") -> str:
    """A tiny model whose 101 words are t0 ... t100; vLLM has no kernel for heads below 32 on a CPU."""
    save_tiny_model(family, path, head_dim=32)
    words = {f"t{index}": index for index in range(101)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2")
    fast.save_pretrained(path)
    return str(path)


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """Prompts of unequal length, with a column for the reward."""
    return [
        {"prompt": " ".join(f"t{5 + row + place}" for place in range(1 + row % 3)), "target": 3 + row}
        for row in range(count)
    ]


class RandomRollout:
    """The engine's protocol; two replicas on two ranks or more. Its logprobs are near the truth of no policy."""

    def __init__(self, model_path: str, args: Any, groups: Any) -> None:
        self.num_replicas = 2 if groups.world.size > 1 else 1
        self._replica = groups.world.rank * self.num_replicas // groups.world.size
        self.log: list[str] = []
        self.seen_weights: list[float] = []
        self.versions: list[int] = []

    def generate(
        self, prompts: list[list[int]], params: GenerationParams, seeds: list[int], policy_version: int
    ) -> list[Completion]:
        """Random words until t2 or max_tokens."""
        self.log.append("generate")
        self.versions.append(policy_version)
        first = len(prompts) * self._replica // self.num_replicas
        last = len(prompts) * (self._replica + 1) // self.num_replicas
        return [
            _completion(index, prompts[index], params, seeds[index], policy_version) for index in range(first, last)
        ]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Consumes the stream."""
        self.log.append("sync")
        self.seen_weights.append(sum(float(tensor.double().sum()) for _, tensor in tensors))

    def sleep(self) -> None:
        """Noted."""
        self.log.append("rollout sleeps")

    def wake(self, *tags: str) -> None:
        """Noted."""
        self.log.append(" ".join(["rollout wakes", *tags]))


def _completion(index: int, prompt: list[int], params: GenerationParams, seed: int, version: int) -> Completion:
    draw = np.random.default_rng(seed)
    length = int(draw.integers(2, 2 * params.max_tokens))
    ids = [int(token) for token in draw.integers(3, 101, size=min(length, params.max_tokens))]
    if length < params.max_tokens:
        ids[-1] = 2
    return Completion(
        index=index,
        prompt_ids=prompt,
        completion_ids=ids,
        logprobs=[float(value) for value in np.log(1 / 101) + 0.1 * draw.standard_normal(len(ids))],
        finish_reason="stop" if length < params.max_tokens else "length",
        policy_version=version,
    )


def closeness(completion_ids: list[list[int]], target: list[int], **kwargs: Any) -> list[float]:
    """A reward that differs within a group."""
    return [-abs(sum(ids) / len(ids) - goal) / 50 for ids, goal in zip(completion_ids, target, strict=True)]


def brevity(completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float | None]:
    """None for completions of odd length, to be not applicable there."""
    words = [len(text.split()) for text in completions]
    log_extra("words", words)
    log_metric("mean_words", sum(words) / len(words))
    return [None if count % 2 else 1.0 / (1 + count) for count in words]


def grpo_fields(**fields: Any) -> dict[str, Any]:
    """A quick deterministic run, unless said otherwise."""
    return {
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "vllm_importance_sampling_mode": "token_truncate",
        **fields,
    }


def train_grpo(
    path: str, rows: list[dict[str, Any]], fields: dict[str, Any], given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains on the calling ranks with the stand-in sampler; what a user would see of it."""
    from megalign.trainers import online
    from megalign.trainers.grpo import GRPOTrainer

    given = dict(given or {})
    resume, stop = given.pop("resume", None), given.pop("stop", None)
    recorder = Recorder()
    given["callbacks"] = [recorder, stop] if stop else [recorder]
    given.setdefault("reward_funcs", [closeness, brevity])
    real, online.VllmEngine = online.VllmEngine, RandomRollout
    try:
        trainer = GRPOTrainer(path, args=GRPOConfig(**grpo_fields(**fields)), train_dataset=rows, **given)
        log = watch(trainer)
        output = trainer.train(resume_from_checkpoint=resume)
    finally:
        online.VllmEngine = real
    return {
        "history": trainer.state.log_history,
        "output": output,
        "events": recorder.events,
        "log": log,
        "versions": trainer.rollout.versions,
        "weights": trainer.rollout.seen_weights,
        "digest": digest(fields["output_dir"]),
    }


def train_grpo_with_vllm(
    path: str, rows: list[dict[str, Any]], fields: dict[str, Any], resume: str | None = None
) -> dict[str, Any]:
    """The same with the real sampler; for fresh processes."""
    from megalign.trainers.grpo import GRPOTrainer

    fields = {"vllm_max_model_length": 64, "vllm_cpu_kv_cache_gib": 0.0625, **fields}
    trainer = GRPOTrainer(
        path, [closeness], GRPOConfig(**grpo_fields(**fields)), train_dataset=rows, eval_dataset=rows[:3]
    )
    trainer.train(resume_from_checkpoint=resume)
    return {"history": trainer.state.log_history, "digest": digest(fields["output_dir"])}


def watch(trainer: Any) -> list[str]:
    """One list in which the calls to the engines appear in order."""
    log: list[str] = trainer.rollout.log
    log.clear()

    def noted(engine: Any, method: str, name: str) -> None:
        original = getattr(engine, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return original(*args, **kwargs)

        setattr(engine, method, call)

    for method in ("forward", "train_step", "eval_step", "sleep", "wake"):
        noted(trainer.policy, method, f"policy {method}")
    if trainer.reference is not None:
        noted(trainer.reference.engine, "forward", "reference forward")
    return log
