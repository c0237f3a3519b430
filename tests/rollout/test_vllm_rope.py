"""Models that vLLM would rotate otherwise than the trainer are refused before it starts."""

from __future__ import annotations

import pytest

from megalign.conversion.families import architecture_of
from megalign.errors import UserError
from megalign.rollout.vllm_model import check_rope
from tests.tiny import CONFIGS


@pytest.mark.parametrize(("limit", "told"), [(None, "length 128 is past.*16.*16 or less"), (17, "length 17 is past")])
def test_longrope_past_the_original_length_is_refused(limit: int | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_rope(architecture_of(CONFIGS["phi3"]().to_dict()), limit)


def test_other_models_and_shorter_limits_pass() -> None:
    check_rope(architecture_of(CONFIGS["phi3"]().to_dict()), 16)
    for family in ("llama", "gemma3_text"):
        check_rope(architecture_of(CONFIGS[family]().to_dict()), None)
