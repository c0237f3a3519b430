"""The sampler's correction and the off-policy mask against TRL 1.16 on the same tensors, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from megalign.algos.importance import SAMPLING_COUNTS, off_policy_mask, rollout_importance_weights, sampling_metrics
from megalign.batch import Batch, Counts
from tests.algos.completions import LENGTHS, NAN, PROMPT, WIDTH, as_table, counts_of, packed, recorded, value_of
from tests.algos.trl_reference import trl_scored_generation

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

    scored = {name: float(count(batch)) for name, count in SAMPLING_COUNTS.items()}
    assert scored == {"scored_tokens": counts_of(data).tokens - 1}
    metrics = sampling_metrics(batch, replace(counts_of(data), named=scored), **clips)
    names = {name for name in expected if name.startswith("sampling/")}
    assert set(metrics) == names and len(names) == 5
    for name in names:
        assert value_of(metrics[name]) == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("mode", MODES)
def test_a_dummy_batch_adds_nothing_to_the_sampling_metrics(mode: str) -> None:
    dummy, clips = Batch.dummy(4), {"mode": mode, "clip_max": 3.0}
    assert rollout_importance_weights(dummy, **clips).shape == (4,)
    metrics = sampling_metrics(dummy, Counts(tokens=5, sequences=2, named={"scored_tokens": 5}), **clips)
    neutral = {"sum": 0.0, "min": float("inf"), "max": -float("inf")}
    assert all(value_of(metric) == neutral[metric.reduce] for metric in metrics.values())


@pytest.mark.parametrize("name", ["old_logprobs", "rollout_logprobs"])
def test_the_off_policy_mask_is_trls(name: str) -> None:
    data = recorded()
    data["rollout_logprobs"][4, 1] = NAN  # a token that the sampler could not score
    data["advantages"] = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    batch = packed(data, ("old_logprobs", name) if name == "rollout_logprobs" else (name,))
    logprobs = packed(data, ("logprobs",))["logprobs"]
    seen = set()
    for threshold in (-0.2, -0.05, 0.0, 0.05, 0.2):
        expected = GRPOTrainer.get_off_policy_mask(
            data["advantages"][:, None], data["logprobs"], data[name], data["loss_mask"].double(), threshold
        )
        ours = off_policy_mask(logprobs, data["advantages"], batch, threshold=threshold)
        assert ours.tolist() == expected[:, 0].bool().tolist()
        seen.add(tuple(ours.tolist()))
    assert len(seen) > 2


def test_without_a_sampler_nothing_is_off_policy() -> None:
    data = recorded()
    logprobs = packed(data, ("logprobs",))["logprobs"]
    assert off_policy_mask(logprobs, -data["advantages"].abs(), packed(data, ()), threshold=0.0).all()
    assert off_policy_mask(torch.zeros(4), torch.zeros(0), Batch.dummy(4), threshold=0.0).shape == (0,)
