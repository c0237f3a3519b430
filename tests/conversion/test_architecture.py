"""config.json -> Architecture, for old and new transformers; what is refused is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from megalign.conversion.families import architecture_of
from megalign.errors import UserError
from tests.tiny import CONFIGS, LLAMA3_ROPE


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    return {**CONFIGS[family]().to_dict(), "architectures": [name], **changes}


def test_a_family_states_its_difference() -> None:
    read = {family: architecture_of(config_of(family)) for family in CONFIGS}
    assert [(a.family, a.qkv_bias, a.qk_norm) for a in read.values()] == [
        ("llama", False, False),
        ("qwen2", True, False),
        ("qwen3", False, True),
    ]
    assert [a.head_dim for a in read.values()] == [12, 8, 16]
    assert [a.tied_embeddings for a in read.values()] == [True, False, True]


def test_rope_of_transformers_5_and_of_older_configs_are_one() -> None:
    new = config_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    old = {key: value for key, value in new.items() if key != "rope_parameters"} | {"rope_theta": 5e5}
    assert architecture_of(new) == architecture_of(old)
    assert architecture_of(old).rotary_base == 5e5
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert architecture_of({**old, "rope_scaling": scaling}).rope_scaling == scaling
    linear = architecture_of({**old, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear.rope_scaling == {"rope_type": "linear", "factor": 4.0} and linear.rotary_base == 5e5


def test_absent_optional_keys_mean_what_transformers_means() -> None:
    config = config_of("llama")
    for key in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_parameters", "architectures"):
        del config[key]
    read = architecture_of(config)
    assert (read.head_dim, read.num_query_groups, read.tied_embeddings) == (8, 4, False)
    assert (read.rotary_base, read.rope_scaling) == (10000.0, None)
    qwen3 = config_of("qwen3")
    del qwen3["head_dim"]
    assert architecture_of(qwen3).head_dim == 128


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "llama",
            {"architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel'.*LlamaForCausalLM, Qwen2ForCausalLM",
        ),
        ("llama", {"architectures": None, "model_type": "gpt2"}, "'gpt2'.*Qwen3ForCausalLM"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"rms_norm_eps": None}, "no rms_norm_eps"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4.*num_key_value_heads=3"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*linear, llama3"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        (
            "qwen2",
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "use_sliding_window=True",
        ),
        ("qwen3", {"layer_types": ["sliding_attention"]}, "sliding"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        architecture_of(config_of(family, **changes))


def test_inactive_sliding_window_settings_pass() -> None:
    config = config_of("qwen2", layer_types=None, use_sliding_window=False, sliding_window=4096)
    assert architecture_of(config).qkv_bias


def test_vocabulary_is_padded_to_a_multiple_of_tp() -> None:
    read = architecture_of(config_of("llama"))
    assert [read.padded_vocab_size(tp) for tp in (1, 2, 4)] == [101, 102, 104]
