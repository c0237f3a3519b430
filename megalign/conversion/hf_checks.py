"""Whether a Hugging Face directory holds exactly the model that its config.json describes."""

from __future__ import annotations

from itertools import islice

import torch

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import SCORE_HEAD, is_classifier, rules_of
from megalign.conversion.hf_files import HfReader, listing
from megalign.conversion.names import numbered
from megalign.conversion.rules import hf_shapes
from megalign.errors import UserError

_COMPARED_ROWS = 64
_FAR = 1000  # missing tensors, beside as many as there are


def check_directory(reader: HfReader, architecture: Architecture) -> None:
    """By the files' headers; raises for what is missing, unexpected or mis-shaped. A new score head is in no file."""
    _refuse_far_more(reader, architecture)
    has_new_head = architecture.num_labels is not None and not is_classifier(reader.config)
    expected = hf_shapes(rules_of(architecture), architecture)
    if has_new_head:
        del expected[SCORE_HEAD]
    # A tied head may be in the file as a second copy of the embedding; a score head takes any other's place.
    ignored = {"lm_head.weight", "lm_head.bias"} if architecture.tied_embeddings or has_new_head else set()
    reader.check(expected, ignored=ignored | _behind_the_last_layer(reader, architecture))
    if architecture.tied_embeddings and not has_new_head:
        _check_tied_head(reader)


def _refuse_far_more(reader: HfReader, architecture: Architecture) -> None:
    """A config.json that asks for far more tensors than there are: not all of their names are made."""
    held = set(reader.names())
    missing = (
        name
        for rule in rules_of(architecture)
        for key in rule.keys(architecture)
        for tensor in rule.hf
        if (name := numbered(tensor.name, key.indices)) not in held
    )
    if len(found := list(islice(missing, len(held) + _FAR))) == len(held) + _FAR:
        raise UserError(
            f"{reader.path} does not fit its config.json, which has num_hidden_layers={architecture.num_layers} and "
            f"asks for far more than its {len(held)} tensors; missing tensors: {listing(found)} at least"
        )


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
