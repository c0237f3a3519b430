"""Layouts that every number must agree on, and an engine at one of them inside a test rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalign.config import SFTConfig
from megalign.parallel.groups import ParallelGroups, initialize
from megalign.train_engine import TrainEngine


class Layout(NamedTuple):
    """Sizes of the axes; `dp` is what the ranks leave, experts are split inside tp * cp * dp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    sp: bool = False
    first: int | None = None  # layers of the first stage

    @property
    def world(self) -> int:
        """Ranks that the layout needs."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields that make it."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "sequence_parallel": self.sp,
            "num_layers_in_first_pipeline_stage": self.first,
        }

    def __str__(self) -> str:
        changed = [(name, value) for name, value in self._asdict().items() if value != self._field_defaults[name]]
        return "".join(name if value is True else f"{name}{value}" for name, value in changed) or "one"


ONE_RANK = Layout()
LAYOUTS = [
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(dp=2),
    Layout(cp=2),
    Layout(pp=2, vpp=2),
    Layout(pp=2, first=1),
    Layout(tp=2, pp=2),
]
EIGHT_RANKS = Layout(tp=2, pp=2, dp=2)
EVERYTHING = Layout(tp=2, sp=True, cp=2, pp=2, vpp=2)


def groups_of(layout: Layout) -> ParallelGroups:
    """Megatron's groups for a layout."""
    return initialize(arguments(layout), timeout_s=100)


def arguments(layout: Layout, **fields: Any) -> SFTConfig:
    """A config at this layout, fp32 unless said otherwise."""
    fields = {"bf16": False, "output_dir": "unused", **fields}
    return SFTConfig(**layout.fields, **fields)


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


@torch.no_grad()
def gradients_of(engine: TrainEngine) -> dict[str, Tensor]:
    """Whole gradients in Hugging Face names, from DDP's buffers; the engine is not usable afterwards."""
    for model in engine._models:
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)
    return {name: tensor.clone() for name, tensor in engine.gathered()}
