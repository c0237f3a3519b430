"""A loss or a gradient that is not finite on one rank: no rank changes anything, and all that follows is the same."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalign.algos.supervised import sft_loss
from megalign.train_engine import TrainEngine
from tests.by_hand import random_batch
from tests.layouts import Layout, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels

pytestmark = pytest.mark.megatron


class _BadGradient(torch.autograd.Function):
    """The value as it is, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def bad_loss(columns: Any, batch: Any, counts: Any) -> Any:
    """An infinite loss whose gradient is finite: 0."""
    loss, metrics = sft_loss(columns, batch, counts)
    return (loss * 0 + math.inf), metrics


def bad_gradient(columns: Any, batch: Any, counts: Any) -> Any:
    """A finite loss; the gradient is lost on its way to the logprobs."""
    return sft_loss({**columns, "logprobs": _BadGradient.apply(columns["logprobs"])}, batch, counts)


FAULTS = {"loss": bad_loss, "gradient": bad_gradient}


def step(engine: TrainEngine, number: int, fault: str | None = None) -> Any:
    """Two microbatches; the fault is in the second one of the last rank, which has the last stage."""
    world, first_row = engine.groups.world, 10 * number + 2 * engine.groups.dp.rank
    batches = [replace(random_batch(row), rows=(row,)) for row in (first_row, first_row + 1)]
    broken = batches[1].rows if world.rank == world.size - 1 else None

    def loss(columns: Any, batch: Any, counts: Any) -> Any:
        return (FAULTS.get(fault, sft_loss) if batch.rows == broken else sft_loss)(columns, batch, counts)

    if fault == "weight" and world.rank == 0:  # no loss and no logprob knows of it
        bad = next(engine._models[0].parameters()).register_hook(lambda gradient: gradient * math.nan)
    result = engine.train_step(batches, loss, learning_rate=1e-2)
    if fault == "weight" and world.rank == 0:
        bad.remove()
    return result


def with_and_without(path: str, layout: Layout, fault: str, fields: dict[str, Any]) -> dict[str, Any]:
    faulty, sound = make_engine(path, layout, **fields), make_engine(path, layout, **fields)
    first = step(faulty, 0, fault)  # before AdamW has a state
    for engine in (faulty, sound):
        step(engine, 1)
    skipped = step(faulty, 2, fault)
    after = [step(faulty, number).loss for number in (3, 4)]
    assert after == [step(sound, number).loss for number in (3, 4)]
    wanted = {name: tensor.clone() for name, tensor in sound.gathered()}
    return {
        "equal": all(torch.equal(tensor, wanted[name]) for name, tensor in faulty.gathered()),
        "first": first.skipped,
        "skipped": skipped.skipped,
        "loss": skipped.loss,
        "grad_norm": skipped.grad_norm,
    }


CASES = [
    *[(Layout(**sizes), "loss", {}) for sizes in ({"dp": 2}, {"tp": 2, "sp": True}, {"pp": 2})],
    (Layout(dp=2), "loss", {"bf16": True}),
    (Layout(dp=2), "gradient", {"use_distributed_optimizer": False}),
    (Layout(dp=2), "gradient", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    (Layout(cp=2), "gradient", {}),
    (Layout(pp=2, vpp=2), "weight", {}),
    (Layout(tp=2, pp=2), "loss", {}),
]


@pytest.mark.parametrize(("layout", "fault", "fields"), CASES, ids=str)
def test_a_skipped_step_leaves_no_trace(
    layout: Layout, fault: str, fields: dict[str, Any], tiny_models: TinyModels
) -> None:
    # Rows of step 2: 20, 21 on the first data-parallel rank, 22, 23 on the second.
    last = 2 * layout.dp + 19
    ranks = run_ranks(layout.world, with_and_without, tiny_models["qwen2"], layout, fault, fields)
    assert (ranks[-1]["loss"] == math.inf) == (fault == "loss") and not math.isnan(ranks[-1]["loss"])
    for found in ranks:
        assert found["equal"] and not math.isfinite(found["grad_norm"])
        if fault == "weight":
            assert not found["skipped"].located and found["skipped"].rows == tuple(range(20, last + 1))
        else:
            assert found["skipped"].located and found["skipped"].rows == (last,) == (found["first"].rows[0] + 20,)


def with_experts(path: str, layout: Layout) -> Any:
    found = with_and_without(path, layout, "gradient", {})
    return found["equal"], found["skipped"].rows


def test_experts_on_other_ranks_skip_alike(tiny_models: TinyModels) -> None:
    # Gradients of experts have a norm of their own, over other ranks than the rest's.
    assert run_ranks(2, with_experts, tiny_models["qwen3_moe"], Layout(dp=2, ep=2)) == [(True, (23,))] * 2
