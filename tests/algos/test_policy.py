"""GRPO losses, ratios and corrections against TRL 1.16 on the same tensors, plain formulas and hand
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megalign.algos.policy import grpo_loss, rollout_importance_weights, sampling_metrics
from megalign.batch import Batch, Counts, Metric
from tests.algos.trl_reference import trl_loss, trl_scored_generation

NAN = float("nan")
PROMPT = 2  # tokens of every prompt
LENGTHS = (5, 1, 6, 3, 4, 2)  # completion lengths
WIDTH = max(LENGTHS)
MAX_COMPLETION_LENGTH = 7
BASE: dict[str, Any] = {
    "beta": 0.0,
    "epsilon": 0.1,
    "epsilon_high": None,
    "importance_sampling_level": "token",
    "loss_type": "grpo",
    "max_completion_length": MAX_COMPLETION_LENGTH,
}


def recorded() -> dict[str, Tensor]:
    """[B, C] tensors as TRL pads them; old and reference log probabilities are off by fixed noise."""
    generator = torch.Generator().manual_seed(1)

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = (len(LENGTHS), WIDTH)
    logprobs = -noise(1.0, *size).abs()
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[2, 2:4] = False  # a tool's answer
    mask[3] = False  # a truncated completion that is masked as a whole
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + noise(0.2, *size),
        "ref_logprobs": logprobs + noise(0.3, *size),
        "rollout_logprobs": logprobs + noise(0.4, *size),
        "entropy": noise(1.0, *size).abs(),
        "loss_mask": mask,
        "advantages": noise(1.0, len(LENGTHS)),
    }


def packed(data: dict[str, Tensor], columns: Sequence[str], rows: Sequence[int] | None = None) -> Batch:
    """The rows as one packed batch with a dummy tail; what stands on prompts and tail must not matter."""
    rows = range(len(LENGTHS)) if rows is None else rows

    def flat(table: Tensor, filler: float) -> Tensor:
        pieces = []
        for row in rows:
            pieces += [table.new_full((PROMPT,), filler), table[row, : LENGTHS[row]]]
        return torch.cat([*pieces, table.new_full((3,), filler)])

    lengths = [PROMPT + LENGTHS[row] for row in rows] + [3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    token_columns = {name: flat(data[name], -50.0) for name in columns}
    token_columns["loss_mask"] = flat(data["loss_mask"], False)
    return Batch(
        tokens=torch.ones(int(bounds[-1]), dtype=torch.int64),
        cu_seqlens=bounds.int(),
        num_sequences=len(rows),
        token_columns=token_columns,
        sequence_columns={"advantages": data["advantages"][list(rows)]},
    )


def outputs_of(data: dict[str, Tensor], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    columns = packed(data, ("logprobs", "entropy"), rows).token_columns
    return {"logprobs": columns["logprobs"].requires_grad_(), "entropy": columns["entropy"]}


def counts_of(data: dict[str, Tensor]) -> Counts:
    tokens = float(data["loss_mask"].sum())
    return Counts(tokens=tokens, sequences=len(LENGTHS), generation_tokens=tokens)


def trl_inputs(data: dict[str, Tensor], weights: Tensor | None) -> dict[str, Tensor]:
    shape = (len(LENGTHS), PROMPT)
    inputs = {
        "prompt_ids": torch.ones(shape, dtype=torch.int64),
        "prompt_mask": torch.ones(shape, dtype=torch.int64),
        "completion_ids": torch.ones(data["logprobs"].shape, dtype=torch.int64),
        "completion_mask": data["loss_mask"].long(),
        "advantages": data["advantages"],
        "old_per_token_logps": data["old_logprobs"],
        "ref_per_token_logps": data["ref_logprobs"],
        "num_items_in_batch": data["loss_mask"].sum(),
    }
    return inputs if weights is None else {**inputs, "importance_sampling_ratio": weights}


def value_of(metric: Metric) -> float:
    return metric.value.item()


@pytest.mark.parametrize("correction", [None, "sequence_mask", "token_truncate"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_gradient_and_metrics_are_trls(loss_type: str, level: str, correction: str | None) -> None:
    data = recorded()
    columns = ["old_logprobs", "ref_logprobs", "rollout_logprobs"]
    batch, weights = packed(data, columns), None
    if correction is not None:
        clips = {"mode": correction, "clip_max": 1.3}
        ours = rollout_importance_weights(batch, **clips)
        batch = batch.with_token_columns(importance_weights=ours)
        weights = as_table(ours, data)
        weights = weights[:, :1] if correction.startswith("sequence") else weights
    for epsilon_high, beta, bias_correction in product((None, 0.25), (0.0, 0.3), (True, False)):
        leaf = data["logprobs"].clone().requires_grad_()
        expected, expected_metrics = trl_loss(
            trl_inputs(data, weights),
            leaf,
            data["entropy"],
            loss_type=loss_type,
            level=level,
            epsilon=0.1,
            epsilon_high=epsilon_high,
            beta=beta,
            max_completion_length=MAX_COMPLETION_LENGTH,
            bias_correction=bias_correction,
        )
        outputs = outputs_of(data)
        loss, metrics = grpo_loss(
            outputs,
            batch,
            counts_of(data),
            beta=beta,
            epsilon=0.1,
            epsilon_high=epsilon_high,
            loss_type=loss_type,
            importance_sampling_level=level,
            max_completion_length=MAX_COMPLETION_LENGTH,
            use_bias_correction_kl=bias_correction,
        )
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        expected.backward()
        loss.backward()
        ours = as_table(outputs["logprobs"].grad, data)
        torch.testing.assert_close(ours, leaf.grad * data["loss_mask"], rtol=1e-6, atol=1e-9)
        assert set(metrics) == set(expected_metrics)
        for name, value in expected_metrics.items():
            assert value_of(metrics[name]) == pytest.approx(value, rel=1e-6), name


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


MODES = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")


@pytest.mark.parametrize(("clip_min", "clip_max"), [(None, 1.2), (0.8, 1.2), (0.8, None)])
@pytest.mark.parametrize("mode", MODES)
def test_correction_and_its_metrics_are_trls(mode: str, clip_min: float | None, clip_max: float | None) -> None:
    data = recorded()
    data["loss_mask"][3] = True  # TRL takes its mask from the completions' lengths and the tools' masks
    data["loss_mask"][3, LENGTHS[3] :] = False
    data["rollout_logprobs"][4, 1] = NAN
    rows = range(len(LENGTHS))
    output, expected = trl_scored_generation(
        torch.zeros(len(LENGTHS), 1),
        torch.ones(1),
        num_generations=2,
        scale_rewards="group",
        prompts=[[1] * PROMPT for _ in rows],
        completions=[[1] * LENGTHS[row] for row in rows],
        tool_masks=[data["loss_mask"][row, : LENGTHS[row]].int().tolist() for row in rows],
        rollout_logprobs=[data["rollout_logprobs"][row, : LENGTHS[row]].tolist() for row in rows],
        old_logprobs=data["old_logprobs"],
        mode=mode,
        clip_max=clip_max,
        clip_min=clip_min,
    )
    batch = packed(data, ("old_logprobs", "rollout_logprobs"))
    clips = {"mode": mode, "clip_max": clip_max, "clip_min": clip_min}
    theirs = output["importance_sampling_ratio"].double().expand(-1, WIDTH)
    weights = as_table(rollout_importance_weights(batch, **clips), data)
    assert (theirs != 1).any()
    torch.testing.assert_close(weights * data["loss_mask"], theirs * data["loss_mask"], rtol=1e-5, atol=1e-6)

    counts = counts_of(data)
    metrics = sampling_metrics(batch, counts, **clips, scored_tokens=counts.tokens - 1)
    names = {name for name in expected if name.startswith("sampling/")}
    assert set(metrics) == names and len(names) == 5
    for name in names:
        assert value_of(metrics[name]) == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("mode", MODES)
def test_a_dummy_batch_adds_nothing_to_the_sampling_metrics(mode: str) -> None:
    dummy, clips = Batch.dummy(4), {"mode": mode, "clip_max": 3.0}
    assert rollout_importance_weights(dummy, **clips).shape == (4,)
    metrics = sampling_metrics(dummy, Counts(tokens=5, sequences=2), **clips)
    neutral = {"sum": 0.0, "min": float("inf"), "max": -float("inf")}
    assert all(value_of(metric) == neutral[metric.reduce] for metric in metrics.values())


def as_table(column: Tensor, data: dict[str, Tensor]) -> Tensor:
    """[T] of a whole packed batch -> [B, C] as TRL pads; 0 beyond a completion's end."""
    table = torch.zeros_like(data["logprobs"])
    start = 0
    for row, length in enumerate(LENGTHS):
        start += PROMPT
        table[row, :length] = column[start : start + length]
        start += length
    return table


@pytest.mark.parametrize("parts", [[[5, 3, 1, 0, 2, 4]], [[0], [1, 2], [3], [4, 5]], [[3], [5, 4, 2], [], [1, 0]]])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_which_sequences_share_a_microbatch_changes_nothing(loss_type: str, level: str, parts: list[list[int]]) -> None:
    data = recorded()
    arguments = {**BASE, "loss_type": loss_type, "importance_sampling_level": level, "beta": 0.2}
    columns = ("old_logprobs", "ref_logprobs")

    def step(rows: Sequence[int]) -> tuple[Tensor, dict[str, Metric]]:
        if not rows:
            silent = {"logprobs": torch.zeros(4, requires_grad=True), "entropy": torch.ones(4)}
            return grpo_loss(silent, Batch.dummy(4), counts_of(data), **arguments)
        return grpo_loss(outputs_of(data, rows), packed(data, columns, rows), counts_of(data), **arguments)

    whole, whole_metrics = step(range(len(LENGTHS)))
    steps = [step(rows) for rows in parts]
    assert whole.abs() > 1e-3
    torch.testing.assert_close(sum(loss for loss, _ in steps), whole, check_dtype=False)
    combine = {"sum": sum, "min": min, "max": max}
    for name, metric in whole_metrics.items():
        shares = [value_of(metrics[name]) for _, metrics in steps]
        assert combine[metric.reduce](shares) == pytest.approx(value_of(metric), rel=1e-6), name


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


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_a_batch_without_loss_tokens_gives_an_exact_zero_with_a_graph(loss_type: str) -> None:
    data = recorded()
    data["loss_mask"][:] = False
    for batch, outputs in (
        (packed(data, ("old_logprobs", "ref_logprobs")), outputs_of(data)),
        (Batch.dummy(4), {"logprobs": torch.full((4,), -90.0, requires_grad=True), "entropy": torch.ones(4)}),
    ):
        arguments = {**BASE, "loss_type": loss_type, "beta": 0.5}
        loss, metrics = grpo_loss(outputs, batch, Counts(tokens=0, sequences=0, generation_tokens=0), **arguments)
        loss.backward()
        assert loss.item() == 0 and outputs["logprobs"].grad.abs().sum() == 0
        assert value_of(metrics["clip_ratio/low_min"]) == float("inf")  # the neutral element: nothing to show


def test_dapo_refuses_to_guess_the_generation_batchs_tokens() -> None:
    data = recorded()
    counts = Counts(tokens=4, sequences=2)
    with pytest.raises(AssertionError, match="generation_tokens"):
        grpo_loss(outputs_of(data), packed(data, ()), counts, **{**BASE, "loss_type": "dapo"})
