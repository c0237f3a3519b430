"""Hugging Face files -> this rank's parameters, each rank reading only its slices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import SCORE_HEAD, is_classifier, rules_of
from megalign.conversion.hf_checks import check_directory
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
    seed: int = 0,
) -> None:
    """Fills every parameter of the (VPP) chunks, cast to its dtype; a collective over the model copy.

    Every rank checks all tensors of the directory by their headers, so that all raise when one would. A score head
    on a language model's directory begins at random, from `seed`, the same at every layout.
    """
    plan_of(chunks, groups, architecture)  # raises unless the ranks together hold the whole model
    reader = HfReader(path)
    has_new_head = architecture.num_labels is not None and not is_classifier(reader.config)
    shape = hf_shapes(rules_of(architecture), architecture).get(SCORE_HEAD, ())
    new = _new_head(shape, reader.config, seed) if has_new_head else None
    check_directory(reader, architecture)
    for _, tensor, pieces in local_tensors(chunks, groups, architecture).values():
        if sum(torch.Size(piece.shape).numel() for piece in pieces) < tensor.numel():
            tensor.zero_()  # the pad rows of the vocabulary
        for piece in pieces:
            is_new = new is not None and piece.hf_name == SCORE_HEAD
            given = new if is_new else piece.turned(reader.read(piece.hf_name, piece.hf_index))
            tensor[piece.shard_index].copy_(given)


def _new_head(shape: tuple[int, ...], config: Mapping[str, Any], seed: int) -> Tensor:
    """As transformers initialises a score head: normal with initializer_range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * config.get("initializer_range", 0.02)
