"""What is known of GPUs without one."""

from __future__ import annotations

import pytest

from megalign.device import promised_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_rate_is_promised_for_the_parts_whose_sheet_says_it(name: str, tflops: int | None) -> None:
    assert promised_flops(name) == (None if tflops is None else tflops * 1e12)
