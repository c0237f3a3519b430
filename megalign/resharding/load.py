"""Hugging Face files -> this rank's parameters, each rank reading only its slices."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import rules_of
from megalign.conversion.hf_files import HfReader
from megalign.conversion.rules import hf_shapes
from megalign.parallel.groups import ParallelGroups
from megalign.resharding.layout import local_tensors, plan_of


@torch.no_grad()
def load_hf(
    path: str | os.PathLike[str],
    chunks: Sequence[nn.Module],
    groups: ParallelGroups,
    architecture: Architecture,
) -> None:
    """Fills every parameter of the (VPP) chunks, cast to its dtype; a collective over the model copy.

    Every rank checks all tensors of the directory by their headers, so that all raise when one would.
    """
    plan_of(chunks, groups, architecture)  # raises unless the ranks together hold the whole model
    reader = HfReader(path)
    ignored = {"lm_head.weight"} if architecture.tied_embeddings else set()
    reader.check(hf_shapes(rules_of(architecture), architecture), ignored=ignored)
    for _, tensor, pieces in local_tensors(chunks, groups, architecture).values():
        if sum(torch.Size(piece.shape).numel() for piece in pieces) < tensor.numel():
            tensor.zero_()  # the pad rows of the vocabulary
        for piece in pieces:
            tensor[piece.shard_index].copy_(reader.read(piece.hf_name, piece.hf_index))
