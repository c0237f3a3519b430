"""GRPO's losses by hand, and what must not matter to them: microbatches, their order, batches without sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megalign.algos.importance import rollout_importance_weights
from megalign.algos.policy import grpo_loss
from megalign.batch import Batch, Counts, Metric
from tests.algos.completions import (
    BASE,
    LENGTHS,
    MAX_COMPLETION_LENGTH,
    as_table,
    counts_of,
    outputs_of,
    packed,
    recorded,
    value_of,
    with_entropy_mask,
    with_graph,
)

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
COLUMNS = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy_mask")
EVERYTHING = BASE | {
    "beta": 0.2,
    "delta": 1.15,
    "off_policy_mask_threshold": 0.02,
    "top_entropy_quantile": 0.3,
    "entropy_coef": 0.2,
}


def silent(entropy: float = 1.0) -> dict[str, Tensor]:
    """What the head says of a batch without loss tokens; none of it may matter."""
    return {
        "logprobs": torch.full((4,), -90.0, requires_grad=True),
        "entropy": torch.full((4,), entropy, requires_grad=True),
    }


@pytest.mark.parametrize("parts", [[[5, 3, 1, 0, 2, 4]], [[0], [1, 2], [3], [4, 5]], [[3], [5, 4, 2], [], [1, 0]]])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_which_sequences_share_a_microbatch_changes_nothing(loss_type: str, level: str, parts: list[list[int]]) -> None:
    data, leaf = with_graph(recorded())
    data, counts = with_entropy_mask(data, counts_of(data), EVERYTHING["top_entropy_quantile"])
    arguments = EVERYTHING | {"loss_type": loss_type, "importance_sampling_level": level}

    def step(rows: Sequence[int]) -> tuple[Tensor, dict[str, Metric]]:
        if not rows:
            return grpo_loss(silent(), Batch.dummy(4), counts, **arguments)
        batch = packed(data, COLUMNS, rows)
        weights = rollout_importance_weights(batch, mode="token_truncate", clip_max=1.3)
        batch = batch.with_token_columns(importance_weights=weights)
        return grpo_loss(outputs_of(data, rows), batch, counts, **arguments)

    whole, whole_metrics = step(range(len(LENGTHS)))
    steps = [step(rows) for rows in parts]
    assert whole.abs() > 1e-3
    total = sum(loss.double() for loss, _ in steps)
    torch.testing.assert_close(total, whole)
    gradient = torch.autograd.grad(whole, leaf, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total, leaf)[0], gradient)
    combine = {"sum": sum, "min": min, "max": max}
    for name, metric in whole_metrics.items():
        shares = [value_of(metrics[name]) for _, metrics in steps]
        assert combine[metric.reduce](shares) == pytest.approx(value_of(metric), rel=1e-6), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_loss_tokens_gives_an_exact_zero_with_a_graph(loss_type: str) -> None:
    data = recorded()
    data["loss_mask"][:] = False
    data["entropy_mask"] = data["loss_mask"]
    nothing = Counts(tokens=0, sequences=0, generation_tokens=0, named={"entropy_tokens": 0})
    names = []
    for batch, outputs in ((packed(data, COLUMNS), outputs_of(data)), (Batch.dummy(4), silent())):
        loss, metrics = grpo_loss(outputs, batch, nothing, **EVERYTHING | {"loss_type": loss_type})
        loss.backward()
        assert loss.item() == 0 and outputs["logprobs"].grad.abs().sum() == 0
        names.append(list(metrics))
        if "clip_ratio/low_min" in metrics:  # the neutral element: nothing to show
            assert value_of(metrics["clip_ratio/low_min"]) == float("inf")
    assert names[0] == names[1]  # ranks reduce them by name


def test_a_microbatch_by_hand() -> None:
    # one sequence, prompt of one token, ratios e^0.5 and e^-0.5, advantage 2, clip at 1 +- 0.2
    batch = Batch(
        tokens=torch.ones(3, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
        num_sequences=1,
        token_columns={
            "loss_mask": torch.tensor([False, True, True]),
            "old_logprobs": torch.tensor([0.0, -1.0, -1.0]),
        },
        sequence_columns={"advantages": torch.tensor([2.0])},
    )
    outputs = {"logprobs": torch.tensor([0.0, -0.5, -1.5]), "entropy": torch.tensor([9.0, 1.0, 3.0])}
    counts = Counts(tokens=4, sequences=2)
    arguments = {**BASE, "epsilon": 0.2}
    loss, metrics = grpo_loss(outputs, batch, counts, **arguments)
    low = torch.tensor(-0.5).exp().item()
    # the first token is clipped: 1.2 * 2; the second keeps its ratio; mean over 2 tokens, over 2 sequences
    assert loss.item() == pytest.approx(-(2.4 + 2 * low) / 2 / 2)
    assert value_of(metrics["clip_ratio/high_mean"]) == 0.25
    assert value_of(metrics["clip_ratio/high_max"]) == 0.5
    assert value_of(metrics["clip_ratio/low_min"]) == 0.0
    assert value_of(metrics["entropy"]) == 1.0
    loss, _ = grpo_loss(outputs, batch, counts, **{**arguments, "loss_type": "dr_grpo"})
    assert loss.item() == pytest.approx(-(2.4 + 2 * low) / (2 * MAX_COMPLETION_LENGTH))
    # the sequence's mean log ratio is 0, so its ratio is 1 and nothing is clipped
    loss, metrics = grpo_loss(outputs, batch, counts, **{**arguments, "importance_sampling_level": "sequence"})
    assert loss.item() == pytest.approx(-1.0)
    assert value_of(metrics["clip_ratio/region_mean"]) == 0.0


def test_without_old_logprobs_the_gradient_is_the_policy_gradient() -> None:
    data = recorded()
    outputs = outputs_of(data)
    arguments = {**BASE, "loss_type": "bnpo"}
    loss, metrics = grpo_loss(outputs, packed(data, ()), counts_of(data), **arguments)
    loss.backward()
    mask = data["loss_mask"]
    leaf = data["logprobs"].clone().requires_grad_()
    (-(data["advantages"][:, None] * leaf * mask).sum() / mask.sum()).backward()
    torch.testing.assert_close(as_table(outputs["logprobs"].grad, data), leaf.grad)
    assert value_of(metrics["clip_ratio/region_mean"]) == 0.0


def pair(**columns: list[float]) -> Batch:
    """Two completions of two tokens behind prompts of one."""
    return Batch(
        tokens=torch.ones(6, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32),
        num_sequences=2,
        token_columns={"loss_mask": torch.tensor([False, True, True] * 2)}
        | {name: torch.tensor(column) for name, column in columns.items()},
        sequence_columns={"advantages": torch.tensor([2.0, -1.0])},
    )


def by_hand(loss_type: str, batch: Batch, **arguments: Any) -> tuple[float, dict[str, float], list[float]]:
    """Loss, metrics and gradient with log ratios ln 2 and ln 0.5, then ln 4 and ln 1."""
    logprobs = torch.tensor([0.0, 2.0, 0.5, 0.0, 4.0, 1.0]).clamp(min=1e-9).log() - 3.0
    outputs = {"logprobs": logprobs.requires_grad_(), "entropy": torch.tensor([9.0, 1.0, 2.0, 9.0, 3.0, 4.0])}
    counts = Counts(tokens=4, sequences=2, generation_tokens=5, named={"entropy_tokens": 2})
    loss, metrics = grpo_loss(outputs, batch, counts, **BASE | {"loss_type": loss_type} | arguments)
    (gradient,) = torch.autograd.grad(loss, outputs["logprobs"])
    return loss.item(), {name: value_of(metric) for name, metric in metrics.items()}, gradient.tolist()


OLD = [0.0, -3.0, -3.0, 0.0, -3.0, -3.0]
LN2 = 0.6931471805599453


def test_cispo_by_hand() -> None:
    loss, metrics, gradient = by_hand("cispo", pair(old_logprobs=OLD), epsilon_high=1.5)
    # bounded ratios 1.5, 0.5 and 1.5, 1; logprobs LN2 - 3, -LN2 - 3 and 2 LN2 - 3, -3; over 5 generation tokens
    terms = [1.5 * 2 * (LN2 - 3), 0.5 * 2 * (-LN2 - 3), -1.5 * (2 * LN2 - 3), -1 * -3]
    assert loss == pytest.approx(-sum(terms) / 5)
    assert gradient == pytest.approx([0, -3 / 5, -1 / 5, 0, 1.5 / 5, 1 / 5])
    assert metrics["cispo_clip_ratio"] == 0.25  # the 4 has a negative advantage


def test_sapo_by_hand() -> None:
    loss, metrics, gradient = by_hand(
        "sapo", pair(old_logprobs=OLD), sapo_temperature_pos=1.0, sapo_temperature_neg=2.0
    )
    # 4 sigmoid(1), 4 sigmoid(-0.5) times 2; 2 sigmoid(6), 2 sigmoid(0) times -1; means of tokens, of sequences
    sigmoid = {1: 0.7310585786, -0.5: 0.3775406688, 6: 0.9975273768, 0: 0.5}
    first = (4 * sigmoid[1] + 4 * sigmoid[-0.5]) / 2 * 2
    second = -(2 * sigmoid[6] + 2 * sigmoid[0]) / 2
    assert loss == pytest.approx(-(first + second) / 2)
    # d/dlogp = -4 s (1 - s) * ratio * A / 4, whatever the temperature
    slopes = {x: s * (1 - s) for x, s in sigmoid.items()}
    expected = [0, -2 * 2 * slopes[1], -2 * 0.5 * slopes[-0.5], 0, 4 * slopes[6], slopes[0]]
    assert gradient == pytest.approx(expected, rel=1e-4)  # of floats
    assert set(metrics) == {"entropy"}


def test_vespo_by_hand() -> None:
    shape = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 0.5}
    loss, metrics, gradient = by_hand("vespo", pair(old_logprobs=OLD), **shape)
    # products of the ratios 1 and 4: phi 1, and 4 * exp(0.5 * (1 - 4))
    phi = 4 * 0.22313016
    assert metrics["vespo/phi_seq_mean"] == pytest.approx((1 + phi) / 2)
    assert gradient == pytest.approx([0, -2 / 5, -2 / 5, 0, phi / 5, phi / 5])
    assert loss == pytest.approx((-2 * -6 + phi * (2 * LN2 - 6)) / 5)
    # the sampler's correction, 0.5 on one token of the second, enters the product: 2 * exp(0.5 * (1 - 2))
    weights = [7.0, 1.0, 1.0, 7.0, 0.5, 1.0]
    _, metrics, _ = by_hand("vespo", pair(old_logprobs=OLD, importance_weights=weights), **shape)
    assert metrics["vespo/phi_seq_mean"] == pytest.approx((1 + 2 * 0.60653066) / 2)


def test_luspo_and_a_two_sided_clip_by_hand() -> None:
    loss, metrics, _ = by_hand("luspo", pair(old_logprobs=OLD), epsilon=0.2, delta=3.0)
    # min(2 * 2, 1.2 * 2) + min(0.5 * 2, 0.8 * 2); min(-3, -1.2) + min(-1, -1): sums of sequences, their mean
    assert loss == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.0) / 2)
    assert metrics["clip_ratio/high_mean"] == 0.25


def test_an_entropy_quantile_and_a_bonus_by_hand() -> None:
    batch = pair(old_logprobs=OLD, entropy_mask=[True, False, True, True, True, False])
    loss, metrics, _ = by_hand("bnpo", batch, top_entropy_quantile=0.5, entropy_coef=0.1)
    # the policy loss of the tokens 0.5 * 2 and 4 * -1, still over 4 tokens; the bonus over its own 2
    assert metrics["policy_loss"] == pytest.approx(-(1.0 - 4.0) / 4)
    assert metrics["bonus_entropy"] == pytest.approx((2 + 3) / 2)
    assert metrics["entropy"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert loss == pytest.approx(-(1.0 - 4.0) / 4 - 0.1 * 2.5)


def test_a_sequence_too_far_from_the_sampler_is_dropped_if_its_advantage_is_negative() -> None:
    # mean of log(sampler / policy): 0 and -LN2 with the old policy; +1 of both with the sampler's own
    loss, _, gradient = by_hand("bnpo", pair(old_logprobs=OLD), off_policy_mask_threshold=0.5)
    kept, *_ = by_hand("bnpo", pair(old_logprobs=OLD))
    assert loss == kept and gradient[4] != 0
    sampler = [0.0, LN2 - 2, -LN2 - 2, 0.0, 2 * LN2 - 2, -2.0]
    batch = pair(old_logprobs=OLD, rollout_logprobs=sampler)
    _, _, gradient = by_hand("bnpo", batch, off_policy_mask_threshold=0.5)
    assert gradient[3:] == [0, 0, 0] and gradient[2] != 0
    _, _, gradient = by_hand("bnpo", batch, off_policy_mask_threshold=1.5)
    assert gradient[4] != 0


def test_dapo_refuses_to_guess_the_generation_batchs_tokens() -> None:
    data = recorded()
    counts = Counts(tokens=4, sequences=2)
    with pytest.raises(AssertionError, match="generation_tokens"):
        grpo_loss(outputs_of(data), packed(data, ()), counts, **{**BASE, "loss_type": "dapo"})
