"""Which of these tests run, and how exactly the device computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# Read by the libraries when they start: products of one shape always in one order, and fp32 that is not TF32
# (Transformer Engine asks cuBLAS for TF32 itself).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this directory is marked, and skipped without a GPU."""
    absent = pytest.mark.skip(reason="needs a CUDA device")
    on_cpu = os.environ.get("MEGALIGN_GPU_TESTS_ON_CPU") == "1"
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available() and (not on_cpu or item.get_closest_marker("cuda_only")):
            item.add_marker(absent)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """For what is compared bit by bit: torch's attention adds its gradients up in no fixed order otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
