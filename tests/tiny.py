"""Tiny random Hugging Face models of each family, with nothing left at its initial zeros or ones."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

# A vocabulary that 2 does not divide, head_dim unlike hidden / heads, grouped queries, tied and untied.
SIZES = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.5, 2.0],
    long_factor=[2.0, 3.0, 5.0],
)
GEMMA2_CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e5),
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, head_dim=12, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(
        **SIZES, original_max_position_embeddings=16, sliding_window=20, rope_parameters=LONGROPE
    ),
    "glm4": lambda: Glm4Config(**SIZES, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=12, query_pre_attn_scalar=20, sliding_window=6, **GEMMA2_CAPS),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SIZES | {"num_key_value_heads": 1},
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=6,
        sliding_window_pattern=3,
        rope_parameters=GEMMA3_ROPE,
    ),
}
# More experts than a rank has, dense layers between, weights that are divided by their sum and such that are not.
QWEN_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)
LATENT_SIZES = SIZES | dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    moe_intermediate_size=20,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=4,
    beta_slow=1,
    mscale=0.7,
    mscale_all_dim=0.9,
)
GPT_OSS_ROPE = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=4.0,
    beta_slow=1.0,
    truncate=False,
)
MOE_CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, rope_parameters={"rope_theta": 1e4}),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, **QWEN_EXPERTS, norm_topk_prob=False, shared_expert_intermediate_size=28, decoder_sparse_step=2
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, **QWEN_EXPERTS, head_dim=16, norm_topk_prob=True, mlp_only_layers=[2], tie_word_embeddings=True
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **LATENT_SIZES,
        q_lora_rank=None,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.7,
        rope_parameters={"rope_theta": 1e4},
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **LATENT_SIZES,
        q_lora_rank=14,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        rms_norm_eps=1e-5,
        rope_parameters=YARN_ROPE,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        head_dim=12,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=6,
        swiglu_limit=0.5,  # so tight that the tiny model's gates reach it
        rope_parameters=GPT_OSS_ROPE,
    ),
}
# Those with experts have layouts of their own (tests.moe_layouts), and cannot have TP without sequence parallelism.
DENSE_FAMILIES, MOE_FAMILIES = sorted(CONFIGS), sorted(MOE_CONFIGS)
CONFIGS |= MOE_CONFIGS


def save_tiny_model(
    family: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> str:
    """Writes a random model of the family, its config changed by `changes`, to `path`; returns it as a string."""
    return _save(AutoModelForCausalLM, family, path, seed, dtype, changes)


def save_tiny_classifier(family: str, path: Path, *, seed: int = 0, **changes: Any) -> str:
    """The same with a score head of one label, as a reward model has it."""
    return _save(AutoModelForSequenceClassification, family, path, seed, torch.float32, {"num_labels": 1, **changes})


def _save(kind: Any, family: str, path: Path, seed: int, dtype: torch.dtype, changes: dict[str, Any]) -> str:
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.update(changes)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that attention is not uniform and every bias and norm weight shows in the output.
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, router in model.named_parameters():
            if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                router.mul_(5)  # near ties would be decided by rounding, differently at each layout
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.add_(torch.randn_like(bias) * 0.3)
    model.to(dtype).save_pretrained(path)
    return str(path)


def as_saved(model: torch.nn.Module, value: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """`value` of every parameter, by the names of the files: transformers itself holds a layer's experts as one."""
    copy = deepcopy(model)
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            mine.copy_(value(theirs))
    with TemporaryDirectory() as directory:
        copy.save_pretrained(directory)
        return load_file(f"{directory}/model.safetensors")


def load_reference(path: str) -> torch.nn.Module:
    """The same model in transformers, fp32, plain attention."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


class TinyModels(dict[str, str]):
    """Family -> directory of its tiny model, written when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def __missing__(self, family: str) -> str:
        self[family] = save_tiny_model(family, self._directory / family)
        return self[family]
