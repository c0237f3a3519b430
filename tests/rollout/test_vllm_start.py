"""What is refused before vLLM samples, and that nobody pays for its import who does not sample."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalign.config import GRPOConfig
from megalign.errors import UserError
from megalign.parallel.groups import Axis, ParallelGroups, initialize
from megalign.rollout import vllm_engine, vllm_sampling
from tests.ranks import run_ranks
from tests.tiny import TinyModels


def two_ranks() -> ParallelGroups:
    world, alone = Axis(group=None, rank=0, size=2, ranks=[0, 1]), Axis(group=None, rank=0, size=1, ranks=[0])
    return ParallelGroups(world=world, tp=world, pp=alone, cp=alone, dp=alone, ep=alone, etp=world, copy=world)


def test_vllm_is_imported_by_the_engine_only() -> None:
    code = "import sys, megalign.rollout.vllm_engine, megalign.patches.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_vllm_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"^vLLM is not installed: .*tools/install\.sh"):
        vllm_engine._import_vllm()


@pytest.mark.parametrize("name", ["repetition_detection", "trace_decode_token_ids"])
def test_what_a_completion_has_no_word_for_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"generation_kwargs\['{name}'\] is refused"):
        vllm_sampling.check_names([name], SimpleNamespace(SamplingParams=SimpleNamespace(__struct_fields__=[name])))


def test_a_missing_model_is_named() -> None:
    with pytest.raises(UserError, match="'absent' does not exist"):
        vllm_engine.VllmEngine("absent", GRPOConfig(), two_ranks())


def test_experts_of_a_dense_model_are_not_split(tiny_models: TinyModels) -> None:
    args = GRPOConfig(vllm_enable_expert_parallel=True, vllm_tensor_parallel_size=2)
    with pytest.raises(UserError, match=r"^vllm_enable_expert_parallel=True, but \S+ is a dense qwen2 model"):
        vllm_engine.VllmEngine(tiny_models["qwen2"], args, two_ranks())


def errors_of(paths: list[str]) -> list[str]:
    """On a rank: what each model is refused with, one after the other."""
    args = GRPOConfig(bf16=False, vllm_max_model_length=64, vllm_cpu_kv_cache_gib=0.0625)
    groups = initialize(args)
    found = []
    for path in paths:
        with pytest.raises(UserError) as raised:
            vllm_engine.VllmEngine(path, args, groups)
        found.append(str(raised.value).replace(path, "MODEL"))
    return found


@pytest.mark.vllm
def test_what_its_cpu_build_cannot_run_is_said_in_one_sentence(tmp_path: Path, tiny_models: TinyModels) -> None:
    latent = tiny_models["deepseek_v3"]
    assert run_ranks(1, errors_of, [latent, tiny_models["llama"]], fresh=True)[0] == [
        "kv_lora_rank + qk_rope_head_dim 24 must be one of [576] for vLLM on a CPU; use another model or a GPU",
        "head_dim 12 must be one of [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512] for vLLM on a CPU; use "
        "another model or a GPU",
    ]
    assert run_ranks(1, errors_of, [tiny_models["llama"], tiny_models["mixtral"]], fresh=True)[0][1] == (
        "MODEL has experts, but vLLM began with a dense model in this process and has no groups for them; start it "
        "first or in a process of its own"
    )
