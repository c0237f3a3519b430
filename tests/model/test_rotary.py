"""Frequencies, attention factors and rotation against transformers' rotary modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalign.batch import Batch
from megalign.conversion.families import architecture_of
from megalign.model.attention import PackedSequences
from megalign.model.rotary import Rotary, attention_factor, inverse_frequencies
from megalign.parallel.groups import Axis
from tests.tiny import LLAMA3_ROPE, LONGROPE, SIZES

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {key: value for key, value in LONGROPE.items() if key != "partial_rotary_factor"} | {
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": 16,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": LLAMA3_ROPE,
    "yarn": YARN,
    "yarn-no-original": {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"},
    "yarn-ramp": YARN | {"beta_fast": 4.0, "beta_slow": 0.2, "truncate": False},
    "yarn-factor": YARN | {"attention_factor": 1.5},
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "longrope": LONG,
    "longrope-factor": LONG | {"factor": 2.0},
    "longrope-attention": LONG | {"attention_factor": 1.1},
}


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_frequencies_and_factors_are_those_of_transformers(rope: str) -> None:
    config = transformers.LlamaConfig(**SIZES, rope_parameters=dict(ROPES[rope]))
    architecture = architecture_of({**config.to_dict(), "rope_parameters": ROPES[rope]})
    theirs = LlamaRotaryEmbedding(config)
    for length in (12, 16, 17, 40):
        cos, sin = theirs(torch.zeros(1), torch.arange(length)[None])
        angles = torch.outer(torch.arange(length).float(), inverse_frequencies(architecture, length=length))
        factor = attention_factor(architecture)
        torch.testing.assert_close(angles.cos() * factor, cos[0, :, : angles.shape[1]], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(angles.sin() * factor, sin[0, :, : angles.shape[1]], rtol=1e-6, atol=2e-6)


def test_pads_behind_a_sequence_do_not_make_it_a_long_one() -> None:
    """Sixteen tokens are within LongRoPE's original length, padded to eighteen or not."""
    config = transformers.LlamaConfig(**SIZES, rope_parameters=dict(LONG))
    architecture = architecture_of({**config.to_dict(), "rope_parameters": LONG, "architectures": ["LlamaForCausalLM"]})
    given = dict(num_sequences=1, tokens=torch.zeros(18, dtype=torch.int64), cu_seqlens=torch.tensor([0, 18]).int())
    query = torch.randn(18, 4, 8, generator=torch.Generator().manual_seed(0))
    rotated = {
        length: Rotary(architecture)(
            query,
            query,
            PackedSequences.of(Batch(**given, unpadded_lengths=torch.tensor([length])), Axis(None, 0, 1, [0])),
        )[0]
        for length in (15, 16, 17)
    }
    assert torch.equal(rotated[15], rotated[16])
    assert not torch.allclose(rotated[16], rotated[17], atol=1e-3)
