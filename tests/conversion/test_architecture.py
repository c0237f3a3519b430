"""config.json -> Architecture, for old and new transformers; what is refused is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from megalign.conversion.families import FAMILIES, architecture_of, classifier_config, family_of
from megalign.errors import UserError
from tests.tiny import CONFIGS, DENSE_FAMILIES, LLAMA3_ROPE, LONGROPE


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {**CONFIGS[family]().to_dict(), "architectures": [FAMILIES[family].HF_ARCHITECTURE], **changes}


def test_a_family_states_its_difference() -> None:
    read = {family: architecture_of(config_of(family)) for family in DENSE_FAMILIES}
    assert {name: (a.family, a.qkv_bias, a.qk_norm, a.tied_embeddings, a.head_dim) for name, a in read.items()} == {
        "llama": ("llama", False, False, True, 12),
        "mistral": ("mistral", False, False, False, 8),
        "qwen2": ("qwen2", True, False, False, 8),
        "qwen3": ("qwen3", False, True, True, 16),
        "phi3": ("phi3", False, False, False, 8),
        "glm4": ("glm4", True, False, False, 16),
        "gemma2": ("gemma2", False, False, True, 12),
        "gemma3_text": ("gemma3_text", False, True, True, 12),
    }
    rotary = {name: (a.rotary_percent, a.rotary_interleaved, a.local_rotary_base) for name, a in read.items()}
    assert {name: kind for name, kind in rotary.items() if kind != (1.0, False, None)} == {
        "phi3": (0.75, False, None),
        "glm4": (0.5, True, None),
        "gemma3_text": (1.0, False, 100.0),
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_its_model_type_and_a_classifier_that_transformers_has(family: str) -> None:
    config = config_of(family)
    assert config["model_type"] == family
    name = classifier_config(config, None)["architectures"][0]
    assert hasattr(transformers, name) and family_of({"architectures": [name]}) is FAMILIES[family]


def test_windows_of_layers() -> None:
    def windows(family: str, **changes: Any) -> list[int | None]:
        read = architecture_of(config_of(family, **changes))
        return [read.window(layer) for layer in range(4)]

    assert windows("mistral") == [6] * 4
    assert windows("mistral", sliding_window=None) == [None] * 4
    assert windows("phi3") == [20] * 4
    assert windows("gemma2") == windows("gemma2", layer_types=None) == [6, None, 6, None]
    assert windows("gemma3_text") == windows("gemma3_text", layer_types=None) == [6, 6, None, 6]
    assert windows("gemma3_text", layer_types=None, sliding_window_pattern=None) == [6] * 4  # every sixth is full
    switched = {"layer_types": None, "use_sliding_window": True, "sliding_window": 8}
    assert windows("qwen2", **switched, max_window_layers=2) == [None, None, 8, 8]
    assert windows("qwen2", **switched) == [None] * 4  # from layer 28 on


def test_gemma_3_of_older_transformers_is_the_same() -> None:
    new = config_of("gemma3_text")
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e5, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert architecture_of(old) == architecture_of(new)


def test_phi_3_of_older_transformers_is_the_same() -> None:
    new = config_of("phi3")
    rope = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "partial_rotary_factor": rope.pop("partial_rotary_factor")}
    old["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    del rope["rope_type"]
    for kind in ("longrope", "su", "yarn"):
        assert architecture_of({**old, "rope_scaling": {"type": kind, **rope}}) == architecture_of(new)


def test_rope_of_transformers_5_and_of_older_configs_are_one() -> None:
    new = config_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    old = {key: value for key, value in new.items() if key != "rope_parameters"} | {"rope_theta": 5e5}
    assert architecture_of(new) == architecture_of(old)
    assert architecture_of(old).rotary_base == 5e5
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert architecture_of({**old, "rope_scaling": scaling}).rope_scaling == scaling
    linear = architecture_of({**old, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear.rope_scaling == {"rope_type": "linear", "factor": 4.0} and linear.rotary_base == 5e5


def gemma2_defaults() -> set[str]:
    """What its config.json may leave out."""
    return {
        "head_dim", "query_pre_attn_scalar", "sliding_window", "tie_word_embeddings", "hidden_activation",
        "attn_logit_softcapping", "final_logit_softcapping",
    }  # fmt: skip


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
    for family, wanted in {"llama": None, "phi3": 32000, "glm4": 151329, "gemma2": 0, "gemma3_text": 0}.items():
        without = config_of(family, vocab_size=200_000)
        del without["pad_token_id"]
        assert architecture_of(without).pad_token_id == wanted == type(CONFIGS[family]())().pad_token_id
        assert architecture_of(config_of(family, pad_token_id=None)).pad_token_id is None
    gemma = {key: value for key, value in config_of("gemma2").items() if key not in gemma2_defaults()}
    read = architecture_of(gemma)
    assert (read.head_dim, read.softmax_scale, read.sliding_window, read.tied_embeddings) == (256, 1 / 16, 4096, True)
    assert (read.attention_softcap, read.logit_softcap, read.activation) == (50.0, 30.0, "gelu_tanh")


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "llama",
            {"architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel'.*LlamaForCausalLM, MistralForCausalLM",
        ),
        ("llama", {"architectures": None, "model_type": "gpt2"}, "'gpt2'.*Qwen3ForCausalLM"),
        ("llama", {"architectures": None, "model_type": ["llama"]}, r"\['llama'\].*is not supported"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list of names"),
        ("llama", {"architectures": [["Llama"]]}, r"architectures=\[\['Llama'\]\] must be a list"),
        ("llama", {"model_type": "mistral"}, "model_type='mistral' contradicts.*LlamaForCausalLM, whose.*'llama'"),
        ("llama", {"model_type": 3}, "model_type=3 contradicts"),
        ("llama", {"architectures": ["Qwen2ForSequenceClassification"]}, "model_type='llama' contradicts.*'qwen2'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"rms_norm_eps": None}, "no rms_norm_eps"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4.*num_key_value_heads=3"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*linear, llama3"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window=None.*sliding_attention"),
        ("qwen3", {"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers=4"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mistral", {"architectures": ["Mistral3ForConditionalGeneration"]}, "'Mistral3For.*MistralForCausalLM"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ("phi3", {"rope_parameters": {**LONGROPE, "long_factor": [1.0]}}, "long_factor.*has 1 numbers.*6 dims.*have 3"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "lacks short_factor, long_factor"),
        ("glm4", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'.*gelu_pytorch_tanh"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None.*sliding_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"architectures": ["Gemma3ForConditionalGeneration"]}, "'Gemma3ForCond.*Gemma3ForCausalLM"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "'linear' of sliding_attention",
        ),
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
