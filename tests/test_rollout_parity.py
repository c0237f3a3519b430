"""After a weight sync, vLLM's logprobs of its own samples are the trainer's, whatever the two layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalign.algos.supervised import sft_loss
from megalign.batch import Batch, Completion
from megalign.config import GRPOConfig
from megalign.data.collate import completion_sequences, pack
from megalign.parallel.groups import initialize
from megalign.resharding.sync import sync_weights
from megalign.rollout.engine import GenerationParams
from megalign.rollout.redistribute import redistribute
from megalign.train_engine import TrainEngine
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model

TEMPERATURE = 0.7
PROMPTS = [[1, 5 + i, 17, 40 + 3 * i, 9][: 2 + i % 4] for i in range(9)]


def differences(path: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Mean |vLLM - trainer| per token right after a sync, and after the trainer has moved on without one."""
    from megalign.rollout.vllm_engine import VllmEngine

    args = GRPOConfig(bf16=False, vllm_max_model_length=64, vllm_cpu_kv_cache_gib=0.0625, **sizes)
    groups = initialize(args, timeout_s=100)
    policy = TrainEngine(path, args, groups)
    rollout = VllmEngine(path, args, groups)
    found = {}
    for when in ("untrained", "trained"):
        sync_weights(policy, rollout)
        found[when] = difference(policy, sample(rollout, groups))
        for _ in range(3):
            policy.train_step([rows(dist.get_rank(groups.dp.group))], sft_loss, learning_rate=1e-2)
    found["stale"] = difference(policy, sample(rollout, groups))
    return found


def rows(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return pack([{"tokens": torch.randint(3, 101, (12,), generator=generator).tolist()} for _ in range(2)])


def sample(rollout: Any, groups: Any) -> list[Completion]:
    params = GenerationParams(max_tokens=12, temperature=TEMPERATURE)
    seeds = list(range(len(PROMPTS)))
    return redistribute(rollout.generate(PROMPTS, params, seeds, 0), rollout, groups)


def difference(policy: TrainEngine, completions: list[Completion]) -> float:
    assert len(completions) == len(PROMPTS)
    batch = pack(completion_sequences(completions, mask_truncated_completions=False, temperature=TEMPERATURE))
    (columns,) = policy.forward([batch], ("logprobs",))
    gap = (columns["logprobs"] - batch["rollout_logprobs"])[batch["loss_mask"]]
    assert len(gap) == sum(len(completion.completion_ids) for completion in completions)
    return float(gap.abs().mean())


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"pipeline_model_parallel_size": 2, "vllm_tensor_parallel_size": 2}),
        ("qwen3", {"tensor_model_parallel_size": 2, "vllm_tensor_parallel_size": 1}),
        ("qwen2", {"vllm_tensor_parallel_size": 2}),
    ],
    ids=["llama-pp2-vllm2", "qwen3-tp2-vllm1", "qwen2-dp2-vllm2"],
)
def test_vllm_agrees_with_the_trainer(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    # vLLM's CPU kernels know no smaller head than 32, and its qwen2 derives head_dim from hidden_size.
    path = save_tiny_model(family, tmp_path, hidden_size=128, head_dim=32)
    for found in run_ranks(2, differences, path, sizes, timeout=280, fresh=True):
        assert found["untrained"] < 1e-3, found
        assert found["trained"] < 1e-3, found
        assert found["stale"] > 1e-2, found  # else the comparison would pass without any sync
