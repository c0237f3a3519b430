"""Layouts that every number must agree on, and an engine at one of them inside a test rank."""

from __future__ import annotations

from typing import Any, NamedTuple

from megalign.config import SFTConfig
from megalign.parallel.groups import ParallelGroups, initialize
from megalign.train_engine import TrainEngine


class Layout(NamedTuple):
    """Tensor, pipeline and data-parallel sizes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        """Ranks that the layout needs."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}dp{self.dp}"


ONE_RANK = Layout()
LAYOUTS = [Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2)]
EIGHT_RANKS = Layout(tp=2, pp=2, dp=2)


def groups_of(layout: Layout) -> ParallelGroups:
    """Megatron's groups for a layout."""
    return initialize(arguments(layout), timeout_s=100)


def arguments(layout: Layout, **fields: Any) -> SFTConfig:
    """A config at this layout, fp32 unless said otherwise."""
    fields = {"bf16": False, "output_dir": "unused", **fields}
    return SFTConfig(tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, **fields)


def make_engine(
    path: str,
    layout: Layout,
    *,
    trainable: bool = True,
    score_head: bool = False,
    extras: tuple[str, ...] = (),
    **fields: Any,
) -> TrainEngine:
    """A TrainEngine on the calling ranks."""
    kind = {"trainable": trainable, "score_head": score_head, "extras": extras}
    return TrainEngine(path, arguments(layout, **fields), groups_of(layout), **kind)
