"""What is in a torch_dist checkpoint: step, layout, names, sizes; none of its numbers is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalign.checkpoints.find import HUGGING_FACE, engine_directory, manifest_of
from megalign.checkpoints.reader import TorchDistReader, numel
from megalign.checkpoints.stored import stored_name
from megalign.conversion.hf_files import read_config

# Axes as a trainer's manifest names them, and Megatron-LM's options.
_LAYOUT = (
    *("tp", "cp", "pp", "dp", "ep", "etp", "vpp"),
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "world_size",
)


class TensorLine(NamedTuple):
    """A name in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_chunks: int
    is_model: bool  # else the optimizer's, or something else that a run needs to go on

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return numel(self.shape) * self.dtype.itemsize


class Summary(NamedTuple):
    """What there is to say of a checkpoint."""

    directory: Path
    step: int | None
    model: str | None  # the architecture in its config.json, where it has one
    layout: dict[str, Any]  # of the run that wrote it, where that says so; 1 is left out
    tensors: list[TensorLine]


def summary_of(path: Path) -> Summary:
    """Reads no more than what files say of themselves."""
    directory = engine_directory(path)
    reader = TorchDistReader(directory)
    tensors = [
        TensorLine(name, reader.shape(name), reader.dtype(name), reader.num_chunks(name), stored_name(name) is not None)
        for name in reader.names()
    ]
    manifest, common = manifest_of(directory), reader.common()
    noted = manifest.get("layout") or vars(common.get("args", _Nothing()))
    beside = directory / HUGGING_FACE
    architectures = read_config(beside).get("architectures") if beside.is_dir() else None
    return Summary(
        directory=directory,
        step=manifest.get("step", common.get("iteration")),
        model=architectures[0] if architectures else None,
        layout=_layout(noted),
        tensors=sorted(tensors, key=lambda line: (not line.is_model, line.name)),
    )


class _Nothing:
    """No options."""


def _layout(noted: Mapping[str, Any]) -> dict[str, Any]:
    return {name: noted[name] for name in _LAYOUT if isinstance(noted.get(name), int) and noted[name] > 1}
