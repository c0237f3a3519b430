"""GRPO's losses and their options against TRL 1.16 on the same tensors, plain formulas and hand arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from megalign.algos.importance import rollout_importance_weights
from megalign.algos.policy import grpo_loss
from megalign.algos.surrogates import vespo_weights
from tests.algos.completions import (
    BASE,
    MAX_COMPLETION_LENGTH,
    as_table,
    counts_of,
    outputs_of,
    packed,
    recorded,
    trl_inputs,
    value_of,
    with_entropy_mask,
    with_graph,
)
from tests.algos.trl_reference import trl_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
COLUMNS = ("old_logprobs", "ref_logprobs", "rollout_logprobs")


def assert_trls(arguments: dict[str, Any], correction: dict[str, Any] | None = None) -> None:
    """Loss, gradient of the logits of a full vocabulary and metrics equal TRL's."""
    data, leaf = with_graph(recorded())
    counts, columns, weights = counts_of(data), list(COLUMNS), None
    if arguments.get("top_entropy_quantile", 1.0) < 1.0:
        data, counts = with_entropy_mask(data, counts, arguments["top_entropy_quantile"])
        columns.append("entropy_mask")
    batch = packed(data, columns)
    if correction is not None:
        ours = rollout_importance_weights(batch, **correction)
        batch = batch.with_token_columns(importance_weights=ours)
        weights = as_table(ours, data)
        weights = weights[:, :1] if correction["mode"].startswith("sequence") else weights
        weights = weights.where(data["loss_mask"], 1.0) if weights.shape[1] > 1 else weights

    names = {"importance_sampling_level": "level", "use_bias_correction_kl": "bias_correction"}
    theirs = {names.get(name, name): value for name, value in ({"use_bias_correction_kl": True} | arguments).items()}
    expected, expected_metrics = trl_loss(trl_inputs(data, weights), data["logprobs"], data["entropy"], **theirs)
    expected_gradient = torch.autograd.grad(expected, leaf, retain_graph=True)[0]

    loss, metrics = grpo_loss(outputs_of(data), batch, counts, **arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected_gradient, rtol=1e-6, atol=1e-9)
    if "entropy_coef" in arguments:
        assert expected_metrics.pop("entropy_coef") == arguments["entropy_coef"]  # a controller's, not the loss's
        assert "policy_loss" in metrics
        assert metrics.pop("bonus_entropy").value > 0
    assert set(metrics) == set(expected_metrics)
    for name, value in expected_metrics.items():
        assert value_of(metrics[name]) == pytest.approx(value, rel=1e-6), name


def corrections(loss_type: str) -> list[dict[str, Any] | None]:
    if loss_type == "vespo":  # as TRL, it takes ratios of tokens only
        return [None, {"mode": "token_truncate", "clip_max": 1.3}, {"mode": "token_mask", "clip_max": 1.3}]
    return [None, {"mode": "sequence_mask", "clip_max": 1.3}, {"mode": "token_truncate", "clip_max": 1.3}]


def highs(loss_type: str, level: str) -> tuple[float | None, ...]:
    """epsilon_high; cispo's bounds the ratio itself, and TRL counts the 1 of an empty sequence above less."""
    return (1.02, 1.3) if (loss_type, level) == ("cispo", "sequence") else (None, 0.25)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_metrics_are_trls(loss_type: str, level: str) -> None:
    choices = product(highs(loss_type, level), (0.0, 0.3), (True, False), corrections(loss_type))
    for epsilon_high, beta, bias_correction, correction in choices:
        chosen = {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "epsilon_high": epsilon_high,
            "beta": beta,
            "use_bias_correction_kl": bias_correction,
        }
        assert_trls(BASE | chosen, correction)


OPTIONS: dict[str, dict[str, Any]] = {
    "two-sided": {"delta": 1.15},
    "two-sided, below the clip": {"delta": 1.05},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "entropy quantile": {"top_entropy_quantile": 0.3},
    "entropy bonus": {"entropy_coef": 0.2},
    "sapo": {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 0.5, "vespo_lambda_neg": 0.0},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_options_are_trls(loss_type: str, level: str, options: dict[str, Any]) -> None:
    common = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.3}
    for correction in corrections(loss_type):
        assert_trls(BASE | common | {"epsilon_high": highs(loss_type, level)[0]} | options, correction)


def test_vespos_weights_are_trls_where_ratios_are_extreme() -> None:
    data = recorded()
    log_ratio = torch.zeros_like(data["logprobs"])
    log_ratio[0, :2] = torch.tensor([30.0, -25.0])  # each is bounded before the sum is
    log_ratio[1, 0], log_ratio[2, 0], log_ratio[5, :] = -40.0, 50.0, 2.5
    weights = torch.ones_like(log_ratio)
    weights[4, 1] = 0.0  # a token that the sampler's correction masks
    shape = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 0.1, "lambda_neg": 1e-6}
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    expected = GRPOTrainer.get_gamma_weights(advantages[:, None], log_ratio, data["loss_mask"], weights, **shape)
    table = packed(data | {"log_ratio": log_ratio, "weights": weights}, ("log_ratio", "weights"))
    ours = vespo_weights(table["log_ratio"], advantages, table, importance_weights=table["weights"].abs(), **shape)
    assert len(expected.unique()) > 3
    torch.testing.assert_close(ours, expected[:, 0])


def test_dapo_divides_by_a_steps_share_of_the_generation_batch_as_trl_does() -> None:
    data = recorded()
    arguments = {"epsilon": 0.1, "epsilon_high": None, "loss_type": "dapo", "beta": 0.0}
    inputs = trl_inputs(data, None) | {"num_items_in_batch": torch.tensor(60)}
    expected, _ = trl_loss(
        inputs,
        data["logprobs"],
        data["entropy"],
        level="token",
        max_completion_length=MAX_COMPLETION_LENGTH,
        bias_correction=True,
        gradient_accumulation_steps=2,
        steps_per_generation=6,
        **arguments,
    )
    counts = replace(counts_of(data), generation_tokens=60 * 2 / 6)
    batch = packed(data, ["old_logprobs"])
    loss, _ = grpo_loss(outputs_of(data), batch, counts, **{**BASE, **arguments})
    torch.testing.assert_close(loss, expected)
