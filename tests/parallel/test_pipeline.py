"""What travels between the stages of a pipeline: each hidden state and each gradient once, and nothing beside them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from torch.overrides import TorchFunctionMode

from megalign import train_engine
from megalign import waiting as waiting_module
from megalign.algos.supervised import sft_loss
from megalign.batch import Batch
from megalign.parallel import pipeline
from megalign.parallel.groups import ParallelGroups
from megalign.parallel.p2p import known_shapes
from megalign.waiting import Waiting
from tests.by_hand import packed
from tests.layouts import ONE_RANK, Layout, groups_of, make_engine
from tests.ranks import run_ranks
from tests.tiny import SIZES, TinyModels

pytestmark = pytest.mark.megatron

TOKENS = [7, 22, 3, 40, 12]  # of the microbatches: not whole rounds of interleaved stages
LAYOUTS = [Layout(pp=2), Layout(pp=2, vpp=2), Layout(pp=4), Layout(tp=2, sp=True, pp=2)]


def microbatches(groups: ParallelGroups) -> list[Batch]:
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 101, (length,), generator=draw) for length in TOKENS]
    return [packed([{"tokens": row, "loss_mask": torch.arange(len(row)) > 0}], groups) for row in rows]


class Messages(TorchFunctionMode):
    """Notes the shapes that torch.distributed is asked to send and to receive."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[list[int]] = []
        self.received: list[list[int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (dist.isend, dist.irecv):
            (self.sent if func is dist.isend else self.received).append(list(args[0].shape))
        return func(*args, **(kwargs or {}))


def messages(path: str, layout: Layout) -> list[tuple[list[list[int]], list[list[int]]]]:
    """On a rank: what a forward pass, then a training step, sends and receives."""
    engine = make_engine(path, layout)
    batches, found = microbatches(engine.groups), []
    for work in (
        lambda: engine.forward(batches),
        lambda: engine.train_step(batches, sft_loss, learning_rate=1e-3),
    ):
        with Messages() as counted:
            work()
        found.append((sorted(counted.sent), sorted(counted.received)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_hidden_states_and_gradients_travel_and_no_shape(tiny_models: TinyModels, layout: Layout) -> None:
    rounds = layout.pp if layout.vpp > 1 else 1
    lengths = [length + -length % layout.tp for length in TOKENS]
    lengths += [layout.tp] * (-len(TOKENS) % rounds)  # dummies
    hidden = [[length // layout.tp, 1, SIZES["hidden_size"]] for length in lengths]
    for rank, found in enumerate(run_ranks(layout.world, messages, tiny_models["llama"], layout)):
        stage = rank // layout.tp
        # Of the chunks on this rank, the first of all takes no hidden states, and the last of all hands none on.
        taken = hidden * (layout.vpp - (stage == 0))
        handed_on = hidden * (layout.vpp - (stage == layout.pp - 1))
        both = sorted(taken + handed_on)
        assert found == [(sorted(handed_on), sorted(taken)), (both, both)]


def test_what_is_waited_for_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 10.0, 14.0])
    monkeypatch.setattr(waiting_module, "_moment", lambda: next(clock))
    waiting = Waiting()
    with waiting():
        handle = waiting.until(SimpleNamespace(wait=lambda: "arrived"))
    assert waiting.seconds() == 0.5  # until somebody waits for it
    assert handle.wait() == "arrived" and waiting.seconds() == 4.5


def waits(path: str, layout: Layout) -> tuple[int, float | None]:
    """How many blocks a step waited in, and what it says of them."""
    engine, made = make_engine(path, layout), []
    with mock.patch.object(train_engine, "Waiting", lambda: made.append(Waiting()) or made[-1]):
        result = engine.train_step(microbatches(engine.groups), sft_loss, learning_rate=1e-3)
    assert result.pipeline_wait_s == made[0].seconds()
    return len(made[0]._spans), result.pipeline_wait_s


def test_a_step_tells_how_long_a_stage_waited(tiny_models: TinyModels) -> None:
    found = {}
    for layout in (Layout(pp=2), Layout(pp=2, vpp=2)):
        found[layout.vpp] = run_ranks(2, waits, tiny_models["llama"], layout)
        assert all(seconds > 0 for _, seconds in found[layout.vpp])
    # Without interleaving each microbatch's hidden states and its gradient are a block, or two in one. With it the
    # handles' waits are blocks beside the messages' own.
    assert all(len(TOKENS) < blocks <= 2 * len(TOKENS) for blocks, _ in found[1])
    assert all(blocks > 4 * len(TOKENS) for blocks, _ in found[2])


def refusals() -> None:
    group = groups_of(Layout(pp=2)).pp
    config = SimpleNamespace(
        hidden_size=8, virtual_pipeline_model_parallel_size=None, microbatch_group_size_per_vp_stage=2
    )
    original = schedules.P2PCommunicator
    with pytest.raises(AssertionError, match="ended before"), known_shapes([3, 5, 2], 1, forward_only=True):
        communicator = schedules.P2PCommunicator(group.group, config)
        if group.rank == 0:
            assert communicator._communicate_shapes(torch.empty(3, 1, 8), None, False, False) == ([0] * 3, [0] * 3)
            with pytest.raises(AssertionError, match=r"sends \[4, 1, 8\] where \[5, 1, 8\] is awaited"):
                communicator._communicate_shapes(torch.empty(4, 1, 8), None, False, False)
            with pytest.raises(AssertionError, match="a message more"):  # no gradients in a forward pass
                communicator._communicate_shapes(None, None, False, True)
        else:
            assert communicator._communicate_shapes(None, None, True, False) == ([3, 1, 8], [0] * 3)
    assert schedules.P2PCommunicator is original


def test_messages_that_the_schedule_does_not_have_are_refused() -> None:
    run_ranks(2, refusals)


def another_microbatch(path: str) -> None:
    engine = make_engine(path, ONE_RANK, trainable=False)
    batches = microbatches(engine.groups)
    with pytest.raises(AssertionError, match="a stage computed 7 rows of a microbatch that has 8"):
        pipeline.evaluate(
            engine._chunks, batches, engine._stage, lambda batch: batch.num_tokens + 1, engine._head, engine.groups
        )


def test_rows_of_another_microbatch_are_refused(tiny_models: TinyModels) -> None:
    run_ranks(1, another_microbatch, tiny_models["llama"])
