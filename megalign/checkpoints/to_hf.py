"""A torch_dist checkpoint -> Hugging Face tensors, one at a time; the rules of `conversion` played backwards."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megalign.checkpoints.index import Index, index_of
from megalign.checkpoints.reader import Part, TorchDistReader, numel
from megalign.checkpoints.stored import Place
from megalign.conversion.architecture import Architecture
from megalign.conversion.families import rules_of
from megalign.conversion.names import Key
from megalign.conversion.rules import Piece, Rule, expand, hf_shapes, pieces
from megalign.errors import UserError

# Megatron and transformers both keep a router's selection bias in it, whatever the model's dtype.
KEPT_IN_FP32 = "router.expert_bias"


class HfTensors:
    """The Hugging Face tensors of a checkpoint, each made when it is asked for."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self.reader = TorchDistReader(path)
        self.index: Index = index_of(self.reader, architecture)
        self._shapes = hf_shapes(rules_of(architecture), architecture)
        self._parts: dict[str, list[tuple[Rule, Key, Piece]]] = {name: [] for name in self._shapes}
        for rule, key in expand(rules_of(architecture), architecture):
            if rule.duplicate:
                continue
            for piece in pieces(rule, architecture, indices=key.indices, tp_rank=0, tp_size=1):
                self._parts[piece.hf_name].append((rule, key, piece))
        self.check_copies()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order of the files."""
        return dict(self._shapes)

    def dtype(self, name: str, wanted: torch.dtype | None = None) -> torch.dtype:
        """What a tensor is written in: its own dtype, or the one that is wanted of the model."""
        parts = self._parts[name]
        found = {self.reader.dtype(self.index.places[key][0].name) for _, key, _ in parts}
        if wanted is not None and not any(rule.megatron.endswith(KEPT_IN_FP32) for rule, _, _ in parts):
            return wanted
        if len(found) > 1:
            kinds = ", ".join(sorted(str(dtype) for dtype in found))
            raise UserError(f"{name} is made of tensors of {kinds}; say with --dtype which it shall be")
        return found.pop()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor; a view of the checkpoint's file where that is what it is."""
        blocks = self.blocks(name, dtype)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def blocks(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The tensor as runs of its rows, in order: views of files where they can be, else one new tensor."""
        dtype, shape = self.dtype(name, dtype), self._shapes[name]
        parts = [
            (piece, part)
            for _, key, piece in self._parts[name]
            for part in self._of(self.index.places[key][0], piece.shard_index)
        ]
        if all(part.view.dtype is dtype for _, part in parts) and _are_runs_of_rows(parts, shape):
            return [part.view for _, part in parts]
        whole = torch.empty(shape, dtype=dtype)
        for piece, part in parts:
            piece.turned(whole[piece.hf_index])[part.index].copy_(part.view)
        return [whole]

    def _of(self, place: Place, region: tuple[slice, ...]) -> list[Part]:
        parts = list(self.reader.parts(place.name, place.index, region))
        wanted = numel(tuple(part.stop - part.start for part in region))
        found = sum(part.view.numel() for part in parts)
        if found != wanted:
            raise UserError(
                f"{self.reader.path} has {found} of the {wanted} numbers of {place.name}; it was not written to its "
                "end by all ranks: use another checkpoint"
            )
        return parts

    def check_copies(self) -> None:
        """A norm that stands under two names must be one norm, or programs would disagree on the model."""
        for key, found in self.index.places.items():
            for other in found[1:]:
                region = tuple(slice(0, size) for size in self.reader.shape(other.name)[len(other.index) :])
                same = all(
                    torch.equal(*(part.view.contiguous().view(torch.uint8) for part in pair))
                    for pair in zip(self._of(found[0], region), self._of(other, region), strict=True)
                )
                if not same:
                    raise UserError(
                        f"{self.reader.path} has {key.name} twice, as {found[0].name} and {other.name}, with other "
                        "numbers; remove one"
                    )


def _are_runs_of_rows(parts: list[tuple[Piece, Part]], shape: tuple[int, ...]) -> bool:
    """Whether the parts, one behind the other, are the tensor."""
    row = 0
    for piece, part in parts:
        first = piece.hf_index[0]
        if piece.transposed or len(piece.hf_index) != len(piece.shard_index) or first.step not in (None, 1):
            return False
        if first.start + part.index[0].start != row or tuple(part.view.shape[1:]) != shape[1:]:
            return False
        row += part.view.shape[0]
    return row == shape[0]
