"""Models with experts: logprobs, every gradient and two AdamW steps equal transformers' at every layout.

The machinery is that of the dense families' parity tests; here are the layouts that experts add.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import test_gradient_parity as gradient_parity
from tests import test_logprob_parity as logprob_parity
from tests.layouts import Layout
from tests.moe_layouts import MOE_LAYOUTS
from tests.tiny import MOE_CONFIGS, save_tiny_model


@pytest.fixture(scope="module", params=sorted(MOE_CONFIGS))
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp(request.param)
    return save_tiny_model(request.param, path)


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
def test_logprobs_equal_transformers(model_path: str, layout: Layout) -> None:
    assert logprob_parity.largest_difference(model_path, layout) < 1e-4  # ranks of experts run as many microbatches


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
def test_every_gradient_equals_plain_autograd(model_path: str, layout: Layout) -> None:
    gradient_parity.check_gradients(model_path, layout, "dapo")


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
def test_two_clipped_steps_equal_torch_adamw(model_path: str, layout: Layout) -> None:
    gradient_parity.check_two_steps(model_path, layout)
