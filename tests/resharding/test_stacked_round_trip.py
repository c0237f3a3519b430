"""Files that hold the experts of a layer as one tensor, transposed and interleaved: bitwise at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layouts import ONE_RANK, Layout
from tests.moe_layouts import MOE_LAYOUTS
from tests.resharding.test_round_trip import check_round_trip, save_model_to_copy

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"gpt_oss": save_model_to_copy("gpt_oss", tmp_path_factory.mktemp("model"))}


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
def test_hf_to_megatron_to_hf_is_bitwise(models: dict[str, str], tmp_path: Path, layout: Layout) -> None:
    check_round_trip(models, tmp_path, layout)


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, sp=True, etp=2)], ids=str)
def test_a_stack_of_one_is_a_stack(tmp_path: Path, layout: Layout) -> None:
    path = save_model_to_copy("gpt_oss", tmp_path / "model", num_local_experts=1, num_experts_per_tok=1)
    check_round_trip({"one": path}, tmp_path / "out", layout)
