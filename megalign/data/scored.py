"""Which token's score a text has: what transformers' sequence classifiers do, and so whoever loads the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megalign.errors import UserError


def pad_of(special_tokens: Mapping[str, int | None], config_pad: int | None) -> int | None:
    """The token that a classifier takes for padding: the tokenizer's; where it has none its end token, as in TRL; with
    neither, config.json's."""
    for name in ("pad_token_id", "eos_token_id"):
        if (token := special_tokens.get(name)) is not None:
            return token
    return config_pad


def check_scored(ids: Sequence[int], pad: int | None, what: str) -> None:
    """UserError where a text has no token to take a score of; a sequence's first is never in the loss."""
    if len(ids) < 2:
        raise UserError(f"{what} has {len(ids)} tokens and a score needs 2; fill it in or drop the row")
    if all(token == pad for token in ids[1:]):
        raise UserError(
            f"{what} has {len(ids)} tokens and those behind the first are pads ({pad}), which have no score; fill it "
            "in or drop the row"
        )


def scored_sequence(ids: Sequence[int], pad: int | None) -> dict[str, list[Any]]:
    """The text as `collate.pack` takes it, with the one token in the loss whose score is the text's: the last that is
    not `pad`, though nothing is padded here. Where the end token is the pad that is the token before it.

    With nothing but pads behind the first token it is the second (transformers' is the first, which is never in a
    loss): a policy that samples such a completion does not end the run.
    """
    scored = next((place for place in reversed(range(2, len(ids))) if ids[place] != pad), 1)
    return {"tokens": list(ids), "loss_mask": [place == scored for place in range(len(ids))]}
