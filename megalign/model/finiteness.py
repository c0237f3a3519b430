"""Which microbatches of a step had a loss, or a gradient of it, that was not finite: what a skipped step tells.

Whether a step is skipped is not decided here but by the gradient norm (model.optimizer), which all ranks share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megalign.batch import Batch, Metric
from megalign.parallel.groups import ParallelGroups
from megalign.parallel.pipeline import Loss
from megalign.parallel.reduce import union_over


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that changed no weight because its gradient was not finite; equal on every rank."""

    rows: tuple[int, ...]  # of the dataset
    located: bool  # whether `rows` are those of the microbatches where it began, and not all of the step's


class Finiteness:
    """Looks at the microbatches of one step as the pipeline's last stage comes to them."""

    def __init__(self) -> None:
        self._seen: list[tuple[Batch, Tensor]] = []  # with whether all was finite, on the device until it is asked for

    def watched(self, loss: Loss) -> Loss:
        """The same loss, whose gradient is NaN where its value is not finite."""

        def checked(columns: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
            value, metrics = loss(columns, batch)
            sound = value.detach().isfinite()
            self._seen.append((batch, sound))
            for tensor in columns.values():
                if tensor.requires_grad:
                    tensor.register_hook(partial(_note, sound))
            if value.requires_grad:
                # An infinite loss may have a finite gradient (of a clamp, say). The factor is 1 otherwise.
                value.register_hook(partial(torch.mul, 1 + 0 * value.detach()))
            return value, metrics

        return checked

    def skipped(self, batches: list[Batch], groups: ParallelGroups) -> SkippedStep:
        """What is known of the step on all ranks; collective. `batches` are this rank's, on any stage."""
        here = [row for batch, sound in self._seen if not sound for row in batch.rows]
        rows = union_over(here, groups.world)
        if rows:
            return SkippedStep(rows=tuple(rows), located=True)
        everything = union_over([row for batch in batches for row in batch.rows], groups.world)
        return SkippedStep(rows=tuple(everything), located=False)


def _note(sound: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:  # of a column that the loss does not read
        sound.logical_and_(gradient.isfinite().all())
