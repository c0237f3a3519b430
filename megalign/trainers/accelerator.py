"""What scripts written for TRL ask of `trainer.accelerator`."""

from __future__ import annotations

from typing import Any

from megalign.parallel.control import barrier
from megalign.parallel.groups import Axis


class Accelerator:
    """What training scripts ask of accelerate's Accelerator, for the ranks of the job."""

    def __init__(self, world: Axis) -> None:
        self._world = world
        self.process_index, self.num_processes = world.rank, world.size
        self.is_main_process = world.rank == 0

    def print(self, *values: Any, **options: Any) -> None:
        """print, once in the job."""
        if self.is_main_process:
            print(*values, **options)

    def wait_for_everyone(self) -> None:
        """Returns when every rank has come here."""
        barrier(self._world)
