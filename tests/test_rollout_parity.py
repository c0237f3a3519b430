"""After a weight sync, vLLM's logprobs of its own samples are the trainer's: every family, whatever the two layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megalign.algos.supervised import sft_loss
from megalign.batch import Batch, Completion
from megalign.config import GRPOConfig
from megalign.data.collate import completion_sequences, pack
from megalign.parallel.groups import ParallelGroups, initialize
from megalign.resharding.sync import sync_weights
from megalign.rollout.engine import GenerationParams, awake
from megalign.rollout.redistribute import redistribute
from megalign.train_engine import TrainEngine
from tests.layouts import Layout
from tests.ranks import run_ranks
from tests.tiny import LONGROPE, YARN_ROPE, save_tiny_model

TEMPERATURE = 0.7
PROMPTS = [[1, 5 + i, 17, 40 + 3 * i, 9][: 2 + i % 4] for i in range(9)]
LIMIT = 64  # tokens of a prompt and its completion
# vLLM's CPU kernels know no smaller head than 32, and its qwen2 derives head_dim from hidden_size.
ORDINARY = {"hidden_size": 128, "head_dim": 32}
# Latent attention there has one size: that of DeepSeek's own models, whose two numbers are these.
LATENT = {
    "hidden_size": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 32,
}
# Keys of other families, which transformers ignores there and vLLM would obey.
OF_OTHERS = {"sliding_window": 8, "logit_scale": 0.5, "bias": True, "qkv_bias": True}
OF_A_FAMILY = {
    "llama": ORDINARY | OF_OTHERS,
    "glm4": ORDINARY | {"sliding_window": 8},
    # 24 of 32 dims are rotated. vLLM takes the long factors for all sequences if LIMIT is past the original length.
    "phi3": ORDINARY
    | {
        "original_max_position_embeddings": LIMIT,
        "rope_parameters": LONGROPE
        | {"short_factor": [1 + i / 4 for i in range(12)], "long_factor": [2.0 + i for i in range(12)]}
        | {"attention_factor": 1.5, "short_mscale": 1.2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"rope_parameters": {key: YARN_ROPE[key] for key in YARN_ROPE if key != "mscale"}},
}


class Case(NamedTuple):
    """A family, the trainer's layout, and whether vLLM splits whole experts over its ranks."""

    family: str
    layout: Layout
    experts_over_ranks: bool = False


# By vLLM's tensor-parallel size. vLLM keeps the groups of a process's first engine: none for experts after a dense one.
RUNS = {
    "dense-vllm1": (
        1,
        [
            Case("qwen3", Layout(tp=2)),
            Case("mistral", Layout(pp=2, vpp=2)),
            Case("gemma2", Layout(cp=2)),
            Case("phi3", Layout(dp=2)),
        ],
    ),
    "dense-vllm2": (
        2,
        [
            Case("llama", Layout(pp=2)),
            Case("qwen2", Layout(dp=2)),
            Case("glm4", Layout(tp=2, sp=True)),
            Case("gemma3_text", Layout(pp=2, vpp=2)),
        ],
    ),
    "experts-vllm1": (
        1,
        [
            Case("mixtral", Layout(dp=2, ep=2)),
            Case("qwen2_moe", Layout(tp=2, sp=True, ep=2, etp=1)),
            Case("deepseek_v2", Layout(pp=2)),
            Case("deepseek_v3", Layout(cp=2)),
        ],
    ),
    "experts-vllm2": (
        2,
        [
            Case("qwen3_moe", Layout(dp=2, ep=2)),
            Case("deepseek_v2", Layout(tp=2, sp=True, etp=2)),
            Case("qwen2_moe", Layout(pp=2, vpp=2), experts_over_ranks=True),
            Case("deepseek_v3", Layout(dp=2, ep=2), experts_over_ranks=True),
        ],
    ),
}


def differences(directory: Path, vllm_tp: int, cases: list[Case]) -> list[dict[str, float]]:
    """On a rank: what `difference` is for each case, one engine after the other."""
    return [differences_of(str(directory / case.family), vllm_tp, case) for case in cases]


def differences_of(path: str, vllm_tp: int, case: Case) -> dict[str, float]:
    """Right after a sync, after the trainer has moved on without one, and after one that follows a sleep."""
    from megalign.rollout.vllm_engine import VllmEngine

    args = GRPOConfig(
        bf16=False,
        vllm_max_model_length=LIMIT,
        vllm_cpu_kv_cache_gib=0.0625,
        vllm_enable_sleep_mode=True,
        vllm_tensor_parallel_size=vllm_tp,
        vllm_enable_expert_parallel=case.experts_over_ranks,
        **case.layout.fields,
    )
    groups = initialize(args, timeout_s=100)
    policy = TrainEngine(path, args, groups)
    rollout = VllmEngine(path, args, groups)
    found = {}
    for when in ("untrained", "trained"):
        sync_weights(policy, rollout)
        found[when] = difference(policy, sample(rollout, groups))
        for _ in range(3):
            policy.train_step([rows(groups)], sft_loss, learning_rate=1e-2)
    found["stale"] = difference(policy, sample(rollout, groups))
    rollout.sleep()
    with awake(rollout):
        sync_weights(policy, rollout)
        found["woken"] = difference(policy, sample(rollout, groups))
    return found


def rows(groups: ParallelGroups) -> Batch:
    """Something to learn, other tokens on each data-parallel rank."""
    generator = torch.Generator().manual_seed(groups.dp.rank)
    sequences = [{"tokens": torch.randint(3, 101, (12,), generator=generator).tolist()} for _ in range(2)]
    return packed(sequences, groups)


def packed(sequences: list[dict[str, Any]], groups: ParallelGroups) -> Batch:
    """As the layout wants its batches."""
    return pack(sequences, multiple=groups.token_multiple, sequence_multiple=groups.sequence_multiple)


def sample(rollout: Any, groups: ParallelGroups) -> list[Completion]:
    params = GenerationParams(max_tokens=12, temperature=TEMPERATURE)
    seeds = list(range(len(PROMPTS)))
    return redistribute(rollout.generate(PROMPTS, params, seeds, 0), rollout, groups)


def difference(policy: TrainEngine, completions: list[Completion]) -> float:
    """Mean |vLLM - trainer| per sampled token."""
    assert len(completions) == len(PROMPTS)
    sequences = completion_sequences(completions, mask_truncated_completions=False, temperature=TEMPERATURE)
    batch = packed(sequences, policy.groups)
    (columns,) = policy.forward([batch], ("logprobs",))
    gap = (columns["logprobs"] - batch["rollout_logprobs"])[batch["loss_mask"]]
    assert len(gap) == sum(len(completion.completion_ids) for completion in completions)
    return float(gap.abs().mean())


@pytest.mark.vllm
@pytest.mark.parametrize("run", RUNS)
def test_vllm_agrees_with_the_trainer(tmp_path: Path, run: str) -> None:
    vllm_tp, cases = RUNS[run]
    for case in cases:
        save_tiny_model(case.family, tmp_path / case.family, **OF_A_FAMILY.get(case.family, ORDINARY))
    for rank in run_ranks(2, differences, tmp_path, vllm_tp, cases, timeout=500, fresh=True):
        for case, found in zip(cases, rank, strict=True):
            assert found["untrained"] < 1e-3, (case, found)
            assert found["trained"] < 1e-3, (case, found)
            assert found["stale"] > 1e-2, (case, found)  # else the comparison would pass without any sync
            assert found["woken"] < 1e-3, (case, found)
