"""Values of a config.json that no model has are refused by key, value and rule; contradictions by both keys."""

from __future__ import annotations

from typing import Any

import pytest

from megalign.conversion.families import architecture_of
from megalign.errors import UserError
from tests.conversion.test_architecture import config_of


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"vocab_size": 0}, "vocab_size=0 must be a whole number from 1"),
        ("llama", {"num_attention_heads": "4"}, "num_attention_heads='4' must be a whole number from 1"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1 must be"),
        ("llama", {"hidden_size": True}, "hidden_size=True must be"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be a number above 0"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ("llama", {"rope_parameters": "x"}, "rope_parameters='x' must be a mapping"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta=0 must be"),
        ("llama", {"is_causal": False}, "is_causal=False"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types='full_attention' must be a list"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": -1}}}, "rope_theta=-1 must be"),
        ("mixtral", {"num_experts_per_tok": None}, "no num_experts_per_tok but null"),
        ("mixtral", {"layer_types": ["sliding_attention"] * 4}, "is not what mixtral computes"),
        ("qwen3_moe", {"num_local_experts": 6, "num_experts": 8}, "num_local_experts=6 contradicts num_experts=8"),
        ("qwen3_moe", {"norm_topk_prob": "no"}, "norm_topk_prob='no' must be true or false"),
        ("deepseek_v2", {"n_group": None}, "'group_limited_greedy' in config.json needs n_group"),
        ("deepseek_v3", {"head_dim": 2}, "head_dim=2 contradicts qk_rope_head_dim=8"),
        ("deepseek_v3", {"qk_rope_head_dim": 9, "head_dim": None}, "qk_rope_head_dim=9 must be even"),
        ("deepseek_v3", {"routed_scaling_factor": None}, "no routed_scaling_factor but null"),
    ],
)
def test_a_wrong_value_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        architecture_of(config_of(family, **changes))


def test_mistral_has_windows_in_the_layers_that_layer_types_names() -> None:
    types = ["full_attention", "sliding_attention"] * 2
    assert architecture_of(config_of("mistral", layer_types=types)).sliding_layers == {1, 3}
    assert architecture_of(config_of("mistral")).sliding_layers == {0, 1, 2, 3}
