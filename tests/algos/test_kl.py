"""The KL estimator against the exact divergence of small distributions."""

from __future__ import annotations

import torch

from megalign.algos.kl import k3

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_estimates_average_to_the_divergence() -> None:
    expected = torch.nn.functional.kl_div(REFERENCE.log(), POLICY, reduction="sum")
    torch.testing.assert_close((POLICY * k3(POLICY.log(), REFERENCE.log())).sum(), expected)


def test_estimates_are_never_negative_and_zero_where_both_agree() -> None:
    values = k3(torch.linspace(-3, 3, 13), torch.zeros(13))
    assert values.min() == 0 and values[6] == 0 and (values > 0).sum() == 12
