"""csrc's CUDA kernels against the same in torch, on the GPU."""

from __future__ import annotations

import pytest
import torch

from tests.test_ops import CASES, DTYPES, check_gradient, check_statistics

pytestmark = pytest.mark.cuda_only


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_torch(name: str, dtype: torch.dtype) -> None:
    check_statistics(name, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_torch(name: str, dtype: torch.dtype) -> None:
    check_gradient(name, dtype, "cuda")
