"""Where vLLM would compute a model otherwise than the trainer: refused before it starts, or told to it."""

from __future__ import annotations

import math

import pytest

from megalign.conversion.families import architecture_of
from megalign.errors import UserError
from megalign.rollout.vllm_model import check_rope, config_fields
from tests.tiny import CONFIGS, LONGROPE, YARN_ROPE


@pytest.mark.parametrize(("limit", "told"), [(None, "length 128 is past.*16.*16 or less"), (17, "length 17 is past")])
def test_longrope_past_the_original_length_is_refused(limit: int | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_rope(architecture_of(CONFIGS["phi3"]().to_dict()), limit)


def test_other_models_and_shorter_limits_pass() -> None:
    check_rope(architecture_of(CONFIGS["phi3"]().to_dict()), 16)
    for family in ("llama", "gemma3_text"):
        check_rope(architecture_of(CONFIGS[family]().to_dict()), None)


def test_yarn_past_the_end_of_vllms_table_is_refused() -> None:
    long = architecture_of({**CONFIGS["llama"]().to_dict(), "rope_parameters": YARN_ROPE})  # 4 * 32
    check_rope(long, 128)
    with pytest.raises(UserError, match="length 129 is past factor.*128 of.*to 128 or less"):
        check_rope(long, 129)


@pytest.mark.parametrize(("mscale", "all_dim"), [(0.7, 0.9), (0.7, None), (None, 0.9), (None, None)])
@pytest.mark.parametrize("factor", [4.0, 1.0])
def test_vllms_latent_attention_scales_as_transformers_does(
    mscale: float | None, all_dim: float | None, factor: float
) -> None:
    rope = {**YARN_ROPE, "factor": factor, "mscale": mscale, "mscale_all_dim": all_dim}
    rope = {name: value for name, value in rope.items() if value is not None}
    told = config_fields(architecture_of({**CONFIGS["deepseek_v3"]().to_dict(), "rope_parameters": rope}))
    told = told["rope_parameters"]

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    wanted = growth(0.7) / growth(0.9) if mscale and all_dim else growth(1)
    assert growth(told["mscale"]) / growth(told["mscale_all_dim"]) == pytest.approx(wanted)
    assert told["mscale_all_dim"] == (all_dim or 0)
    assert told["rope_theta"] == YARN_ROPE["rope_theta"] and told["factor"] == factor


def test_longropes_magnitude_is_said_in_vllms_words_and_in_transformers() -> None:
    rope = {**LONGROPE, "attention_factor": 1.5, "short_mscale": 1.2}
    told = config_fields(architecture_of({**CONFIGS["phi3"]().to_dict(), "rope_parameters": rope}))["rope_parameters"]
    assert told["short_mscale"] == told["long_mscale"] == told["attention_factor"] == 1.5
