"""The KL estimators against the exact divergence of small distributions, and the controllers by hand."""

from __future__ import annotations

import pytest
import torch

from megalign.algos.controllers import AdaptiveKLController, FixedKLController
from megalign.algos.kl import KL_ESTIMATORS, k1, k3

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_estimates_average_to_the_divergence(name: str) -> None:
    expected = torch.nn.functional.kl_div(REFERENCE.log(), POLICY, reduction="sum")
    estimates = KL_ESTIMATORS[name](POLICY.log(), REFERENCE.log())
    torch.testing.assert_close((POLICY * estimates).sum(), expected)


def test_k1_is_of_either_sign_and_k3_never_negative() -> None:
    log_ratios = torch.linspace(-3, 3, 13)
    assert torch.equal(k1(log_ratios, torch.zeros(13)), log_ratios)
    values = k3(log_ratios, torch.zeros(13))
    assert values.min() == 0 and values[6] == 0 and (values > 0).sum() == 12


def test_the_adaptive_coefficient_moves_by_a_clipped_error() -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000.0)
    controller.update(6.6, 100)  # 10% too much: 0.2 * (1 + 0.1 * 0.1)
    assert controller.coefficient == pytest.approx(0.202)
    controller.update(60.0, 100)  # clipped to 20%
    assert controller.coefficient == pytest.approx(0.202 * 1.02)
    controller.update(0.0, 500)
    assert controller.coefficient == pytest.approx(0.202 * 1.02 * 0.9)
    other = AdaptiveKLController(0.2, target=6.0, horizon=1000.0)
    other.load_state_dict(controller.state_dict())
    other.update(6.0, 100)
    assert other.coefficient == controller.coefficient


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKLController(0.05)
    controller.update(100.0, 1000)
    controller.load_state_dict(controller.state_dict())
    assert controller.coefficient == 0.05
