"""FP8's fields become Megatron's, and are refused where FP8 cannot run; a GPU's capability is stood in for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megalign.batch import Batch
from megalign.config import SFTConfig
from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of
from megalign.errors import UserError
from megalign.model.extensions import LOCAL, TRANSFORMER_ENGINE
from megalign.model.fp8 import fp8
from megalign.parallel.groups import Axis, ParallelGroups, initialize
from tests.ranks import run_ranks
from tests.tiny import MOE_CONFIGS

ARCHITECTURE = Architecture(
    family="llama", num_layers=2, hidden_size=64, ffn_hidden_size=192, num_attention_heads=8, num_query_groups=4,
    head_dim=16, vocab_size=100, max_position_embeddings=64, norm_epsilon=1e-5, rotary_base=1e4,
)  # fmt: skip


def sized(**changes: int) -> Architecture:
    return replace(ARCHITECTURE, **changes)


def axis(size: int) -> Axis:
    return Axis(None, 0, size, list(range(size)))


def groups_of(tp: int, etp: int, cp: int = 1, token_unit: int = 1) -> ParallelGroups:
    one = axis(1)
    return ParallelGroups(
        world=axis(tp * cp), tp=axis(tp), pp=one, cp=axis(cp), dp=one, ep=one, etp=axis(etp), copy=axis(tp),
        token_unit=token_unit,
    )  # fmt: skip


def fields(
    monkeypatch,
    capability: tuple[int, int] = (10, 0),
    implementation: str = TRANSFORMER_ENGINE,
    architecture: Architecture = ARCHITECTURE,
    **values: Any,
) -> dict[str, Any]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    tp = values.get("tensor_model_parallel_size", 1)
    groups = groups_of(tp, values.get("expert_tensor_parallel_size", tp))
    return fp8(SFTConfig(**{"bf16": True, **values}), architecture, implementation, groups)


def test_the_fields_become_megatrons(monkeypatch) -> None:
    assert fields(monkeypatch) == {}
    assert fields(monkeypatch, (8, 9), fp8="hybrid") == {"fp8": "hybrid", "fp8_recipe": "delayed"}
    assert fields(monkeypatch, (9, 0), fp8="e4m3", fp8_recipe="blockwise") == {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    assert fields(monkeypatch, fp8="e4m3", fp8_recipe="mxfp8")["fp8_recipe"] == "mxfp8"


@pytest.mark.parametrize(
    "capability, recipe, parts",
    [
        ((8, 0), "delayed", ["8.9 (Ada or Hopper)", "has 8.0", "or drop fp8"]),
        ((8, 0), "tensorwise", ["8.9 (Ada or Hopper)"]),
        ((8, 9), "blockwise", ["9.0 (Hopper)", "one of fp8_recipe delayed, tensorwise"]),
        ((9, 0), "mxfp8", ["10.0 (Blackwell)", "one of fp8_recipe delayed, tensorwise, blockwise"]),
    ],
)
def test_an_older_gpu_is_refused_naming_what_it_can(monkeypatch, capability, recipe, parts) -> None:
    with pytest.raises(UserError) as caught:
        fields(monkeypatch, capability, fp8="hybrid", fp8_recipe=recipe)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    "values, part",
    [
        ({"implementation": LOCAL}, "needs Transformer Engine"),
        ({"bf16": None}, "set bf16=True"),  # fp32 on this machine
        ({"tensor_model_parallel_size": 8}, "intermediate_size / 8 tensor-parallel ranks is 24"),
        (
            {"architecture": sized(hidden_size=72)},
            "hidden_size is 72, and FP8 products need a multiple of 16",
        ),
        (
            {"architecture": sized(hidden_size=80), "fp8_recipe": "mxfp8"},
            "hidden_size is 80, .* multiple of 32",
        ),
        (
            {"architecture": sized(head_dim=10), "tensor_model_parallel_size": 4},
            r"query heads \* head_dim / 4 .* is 20",
        ),
    ],
)
def test_what_fp8_cannot_compute_is_refused(monkeypatch, values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        fields(monkeypatch, fp8="hybrid", **values)


def tiny(family: str, **changes: Any) -> Architecture:
    config = MOE_CONFIGS[family]()
    config.update(changes)
    return architecture_of(config.to_dict())


LATENT = {"q_lora_rank": 16, "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 12, "moe_intermediate_size": 32}
TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    "family, changes, values",
    [
        ("mixtral", {}, {}),
        ("mixtral", {"intermediate_size": 32}, {**TP2, "expert_tensor_parallel_size": 1}),
        ("qwen3_moe", {"moe_intermediate_size": 32}, {}),
        # No layer is dense, so the dense width is of no product.
        ("qwen3_moe", {"moe_intermediate_size": 32, "mlp_only_layers": [], "intermediate_size": 50}, {}),
        ("deepseek_v3", LATENT, {}),
        ("deepseek_v2", {**LATENT, "q_lora_rank": None, "moe_intermediate_size": 16}, {}),
    ],
)
def test_experts_and_latent_attention_of_fitting_sizes_are_computed(monkeypatch, family, changes, values) -> None:
    assert fields(monkeypatch, architecture=tiny(family, **changes), fp8="hybrid", **values)["fp8"] == "hybrid"


@pytest.mark.parametrize(
    "family, changes, values, part",
    [
        ("mixtral", {}, TP2, "the experts' intermediate size / 2 .* is 24, .* use a smaller expert_tensor"),
        ("qwen3_moe", {}, {}, "the experts' intermediate size is 20, .* multiple of 16; drop fp8"),
        ("qwen2_moe", {"moe_intermediate_size": 32}, {}, "the shared expert's intermediate size is 28"),
        ("deepseek_v3", {}, {}, "q_lora_rank is 14"),
        ("deepseek_v3", {**LATENT, "kv_lora_rank": 24}, {}, "kv_lora_rank is 24"),
        (
            "deepseek_v3",
            {**LATENT, "qk_rope_head_dim": 8, "head_dim": 8},
            {},
            r"kv_lora_rank \+ qk_rope_head_dim is 24",
        ),
        (
            "deepseek_v3",
            {**LATENT, "qk_nope_head_dim": 10},
            {},
            r"heads \* \(qk_nope_head_dim \+ qk_rope_head_dim\) is",
        ),
        ("deepseek_v3", {**LATENT, "v_head_dim": 10}, {}, r"heads \* \(qk_nope_head_dim \+ v_head_dim\) is 88"),
        ("deepseek_v3", {**LATENT, "qk_nope_head_dim": 12, "v_head_dim": 12}, TP2, r"is 56, .* smaller tensor_model"),
        ("deepseek_v3", {**LATENT, "intermediate_size": 40}, {}, "^intermediate_size is 40"),
    ],
)
def test_experts_and_latent_attention_of_other_sizes_are_refused(monkeypatch, family, changes, values, part) -> None:
    with pytest.raises(UserError, match=part):
        fields(monkeypatch, architecture=tiny(family, **changes), fp8="hybrid", **values)


@pytest.mark.parametrize(
    "values, part",
    [
        ({"fp8_recipe": "mxfp8"}, "fp8 is not set"),
        ({"fp8": "hybrid", "bf16": False}, "bf16=False"),
    ],
)
def test_what_contradicts_is_refused_at_once(values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        SFTConfig(**values).validate(1)


@pytest.mark.parametrize(
    "tp, cp, unit, multiple",
    [
        (1, 1, 1, 1),
        (4, 1, 1, 4),
        (1, 2, 1, 4),
        (2, 2, 1, 8),
        (1, 1, 16, 16),
        (4, 1, 16, 64),
        (2, 2, 16, 64),
        (1, 3, 32, 96),
    ],
)
def test_every_ranks_tokens_are_a_multiple_of_the_unit(tp: int, cp: int, unit: int, multiple: int) -> None:
    groups = groups_of(tp, tp, cp, token_unit=unit)
    assert groups.token_multiple == multiple
    assert multiple % (tp * cp * unit) == 0 and multiple % groups.sequence_multiple == 0
    assert Batch.dummy(groups.token_multiple).num_tokens % multiple == 0


def units(_: str) -> list[int]:
    values = [{}, {"fp8": "hybrid"}, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}, {}]
    return [initialize(SFTConfig(output_dir="unused", **fields)).token_unit for fields in values]


def test_the_groups_of_a_config_know_its_unit() -> None:
    assert run_ranks(1, units, "") == [[1, 16, 32, 1]]
