"""Hugging Face files -> this rank's parameters, each rank reading only its slices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import SCORE_HEAD, is_classifier, rules_of
from megalign.conversion.hf_files import HfReader
from megalign.conversion.rules import hf_shapes
from megalign.errors import UserError
from megalign.parallel.groups import ParallelGroups
from megalign.resharding.layout import local_tensors, plan_of

_COMPARED_ROWS = 64


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
    expected = hf_shapes(rules_of(architecture), architecture)
    new = _new_head(expected.pop(SCORE_HEAD), reader.config, seed) if has_new_head else None
    # A tied head may be in the file as a second copy of the embedding; a score head takes any other's place.
    ignored = {"lm_head.weight", "lm_head.bias"} if architecture.tied_embeddings or has_new_head else set()
    reader.check(expected, ignored=ignored | _behind_the_last_layer(reader, architecture))
    if architecture.tied_embeddings and not has_new_head:
        _check_tied_head(reader)
    for _, tensor, pieces in local_tensors(chunks, groups, architecture).values():
        if sum(torch.Size(piece.shape).numel() for piece in pieces) < tensor.numel():
            tensor.zero_()  # the pad rows of the vocabulary
        for piece in pieces:
            is_new = new is not None and piece.hf_name == SCORE_HEAD
            given = new if is_new else piece.turned(reader.read(piece.hf_name, piece.hf_index))
            tensor[piece.shard_index].copy_(given)


def _check_tied_head(reader: HfReader) -> None:
    """A tied model's head, where the file has one, must be the embedding; rows all over it tell each rank the same."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head not in reader.names():
        return
    size, width = reader.shape(embedding)
    rows = range(0, size, max(1, size // _COMPARED_ROWS))
    same = reader.shape(head) == (size, width) and all(
        torch.equal(*(reader.read(name, (slice(row, row + 1), slice(0, width))) for name in (head, embedding)))
        for row in rows
    )
    if not same:
        raise UserError(
            f"{reader.path} has an {head} of its own, and tie_word_embeddings in its config.json says that it is the "
            "embedding; set tie_word_embeddings to false, or remove the tensor"
        )


def _behind_the_last_layer(reader: HfReader, architecture: Architecture) -> set[str]:
    """The layers that predict further tokens, which transformers leaves out as well."""
    layers = range(architecture.num_layers, architecture.num_layers + architecture.num_mtp_layers)
    starts = tuple(f"model.layers.{layer}." for layer in layers)
    return {name for name in reader.names() if starts and name.startswith(starts)}


def _new_head(shape: tuple[int, ...], config: Mapping[str, Any], seed: int) -> Tensor:
    """As transformers initialises a score head: normal with initializer_range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * config.get("initializer_range", 0.02)
