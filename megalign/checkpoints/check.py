"""Whether a checkpoint and a Hugging Face directory are one model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megalign.checkpoints.convert import check_files
from megalign.checkpoints.find import engine_directory
from megalign.checkpoints.job import Job
from megalign.checkpoints.to_hf import HfTensors
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_checks import check_directory
from megalign.conversion.hf_files import HfReader

_BLOCK = 1 << 24  # numbers compared at once


class Difference(NamedTuple):
    """How far a tensor is from its counterpart."""

    name: str
    largest: float  # nan where one has a number that is none and the other has not
    bitwise: bool  # the same dtype, the same bits


def differences(hf: Path, checkpoint: Path) -> Iterator[Difference]:
    """Of every tensor, in the order of the files; raises for what either side lacks."""
    reader = HfReader(hf)
    architecture = architecture_of(reader.config)
    check_directory(reader, architecture)
    directory = engine_directory(checkpoint)
    check_files(directory, Job())
    tensors = HfTensors(directory, architecture)
    for name, shape in tensors.shapes().items():
        whole = tuple(slice(0, size) for size in shape)
        yield _compare(name, reader.read(name, whole), tensors.read(name))


def _compare(name: str, theirs: Tensor, ours: Tensor) -> Difference:
    theirs, ours = theirs.contiguous().view(-1), ours.contiguous().view(-1)
    blocks = list(zip(theirs.split(_BLOCK), ours.split(_BLOCK), strict=True))
    if theirs.dtype is ours.dtype and all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in blocks):
        return Difference(name, 0.0, True)
    # Not max() of floats, which would drop a nan.
    largest = torch.stack([(a.double() - b.double()).abs().max() for a, b in blocks]).max()
    return Difference(name, largest.item(), False)
