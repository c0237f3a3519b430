"""Models with experts: Hugging Face -> Megatron -> Hugging Face is bitwise at the layouts that experts add."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layouts import Layout
from tests.moe_layouts import MOE_LAYOUTS
from tests.resharding.test_round_trip import check_round_trip, marked_models
from tests.tiny import MOE_FAMILIES

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return marked_models(MOE_FAMILIES, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
def test_hf_to_megatron_to_hf_is_bitwise(models: dict[str, str], tmp_path: Path, layout: Layout) -> None:
    check_round_trip(models, tmp_path, layout)
