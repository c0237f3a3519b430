"""The trained weights -> the rollout engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megalign import device

if TYPE_CHECKING:  # both stand above this layer
    from megalign.rollout.engine import RolloutEngine
    from megalign.train_engine import TrainEngine


@dataclass
class Synced:
    """What a weight sync moved on this rank."""

    num_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0  # held at most beyond what was held before; on a CPU as seen between two tensors

    @property
    def metrics(self) -> dict[str, float]:
        """For the log; the seconds are a phase of the step."""
        return {
            "perf/weight_sync_gb_per_s": self.num_bytes / self.seconds / 1e9,
            "perf/weight_sync_peak_gb": self.peak_bytes / 1e9,
        }


def sync_weights(engine: TrainEngine, rollout: RolloutEngine) -> Synced:
    """Streams whole tensors, bucket by bucket; a collective over all ranks, both engines awake."""
    synced, started = Synced(), time.perf_counter()
    device.begin_peak()
    before = device.resident_bytes()

    def watched(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            synced.num_bytes += tensor.nbytes
            synced.peak_bytes = max(synced.peak_bytes, device.peak_bytes() - before)
            yield name, tensor

    with closing(engine.gathered()) as tensors:  # an engine that raises leaves no collective under way
        rollout.update_weights(watched(tensors))
    device.synchronize()
    synced.peak_bytes = max(synced.peak_bytes, device.peak_bytes() - before)
    synced.seconds = time.perf_counter() - started
    return synced
