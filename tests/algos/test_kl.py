"""KL estimators against the exact divergence of small distributions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalign.algos.kl import k1, k2, k3

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_unbiased_estimators_average_to_the_divergence(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    expected = torch.nn.functional.kl_div(REFERENCE.log(), POLICY, reduction="sum")
    torch.testing.assert_close((POLICY * estimator(POLICY.log(), REFERENCE.log())).sum(), expected)


def test_k2_is_half_the_squared_log_ratio() -> None:
    ratio = torch.tensor([1.0, -2.0])
    assert k2(ratio, torch.zeros(2)).tolist() == [0.5, 2.0]


def test_k3_is_never_negative_and_zero_where_both_agree() -> None:
    values = k3(torch.linspace(-3, 3, 13), torch.zeros(13))
    assert values.min() == 0 and values[6] == 0 and (values > 0).sum() == 12
