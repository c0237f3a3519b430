"""Activations and gradients travel between pipeline stages without their shapes, which every rank knows.

Of microbatches that differ in tokens (variable_seq_lengths) Megatron sends each tensor's shape first and waits for it,
on a GPU with the device (p2p_communication.py:165/186, called at :302/323). Goes when upstream takes known shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megalign.waiting import Waiting

_NOTHING = [0, 0, 0]  # what upstream answers where nothing is received


@contextlib.contextmanager
def known_shapes(
    rows: Sequence[int], num_chunks: int, *, forward_only: bool, waiting: Waiting | None = None
) -> Iterator[None]:
    """For one schedule over microbatches whose hidden states are [rows, 1, H] on this rank; `waiting` times messages.

    A schedule makes its communicator by this name (schedules.py:861,2010/1025,2169).
    """
    made: list[_KnownShapes] = []

    def make(pp_group: Any, config: Any) -> _KnownShapes:
        made.append(_KnownShapes(pp_group, config, rows, num_chunks, forward_only, waiting or Waiting()))
        return made[-1]

    assert schedules.P2PCommunicator is P2PCommunicator, "one schedule at a time"
    schedules.P2PCommunicator = make
    try:
        yield
    finally:
        schedules.P2PCommunicator = P2PCommunicator
    for communicator in made:
        communicator.check_finished()


class _KnownShapes(P2PCommunicator):
    """The links to the stages before and behind carry the microbatches in the order of Megatron's own table.

    Both passes walk it from its start; backward it counts the chunks from the last one (schedules.py:1079/1217). The
    link from the last stage to the first leads into the next chunk, so it has all but the table's last chunk, which in
    either direction is the one that ends the pass (:1120/1258); without interleaving it has nothing.
    """

    def __init__(
        self, pp_group: Any, config: Any, rows: Sequence[int], num_chunks: int, forward_only: bool, waiting: Waiting
    ) -> None:
        super().__init__(pp_group, config)
        self._waiting = waiting
        table = schedules.get_schedule_table(len(rows), num_chunks, config.microbatch_group_size_per_vp_stage)
        every = [rows[microbatch] for microbatch, _ in table]
        around = [rows[microbatch] for microbatch, chunk in table if chunk < num_chunks - 1]
        before = around if pp_group.rank() == 0 else every
        behind = around if pp_group.rank() == pp_group.size() - 1 else every
        self._inputs, self._outputs = iter(before), iter(behind)
        self._input_gradients = iter([] if forward_only else before)
        self._output_gradients = iter([] if forward_only else behind)

    def _communicate(self, **given: Any) -> tuple[Any, ...]:
        """Sends and receives, and waits for both; or leaves that to the handles, which come by name."""
        with self._waiting():
            *tensors, handles = super()._communicate(**given)
        if handles:
            handles = {name: self._waiting.until(handle) for name, handle in handles.items()}
        return *tensors, handles

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        for sent, link in ((tensor_send_next, self._outputs), (tensor_send_prev, self._input_gradients)):
            if sent is not None:
                expected = self._next_shape(link)
                assert list(sent.shape) == expected, f"a stage sends {list(sent.shape)} where {expected} is awaited"
        return (
            self._next_shape(self._inputs) if recv_prev else _NOTHING,
            self._next_shape(self._output_gradients) if recv_next else _NOTHING,
        )

    def _next_shape(self, link: Iterator[int]) -> list[int]:
        rows = next(link, None)
        assert rows is not None, "a message more than the schedule has"
        return [rows, 1, self.config.hidden_size]

    def check_finished(self) -> None:
        """That all messages of the schedule have passed."""
        links = (self._inputs, self._outputs, self._input_gradients, self._output_gradients)
        left = [len(list(link)) for link in links]
        assert not any(left), f"the schedule has ended before {left} of its messages"
