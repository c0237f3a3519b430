"""The trained weights -> the rollout engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # both stand above this layer
    from megalign.rollout.engine import RolloutEngine
    from megalign.train_engine import TrainEngine


def sync_weights(engine: TrainEngine, rollout: RolloutEngine) -> None:
    """Streams whole tensors, bucket by bucket; a collective over all ranks, both engines awake."""
    rollout.update_weights(engine.gathered())
