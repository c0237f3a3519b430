"""SFTConfig: supervised fine-tuning, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.offline import OfflineConfig
from megalign.config.refused import SFT, Refusal
from megalign.config.values import option
from megalign.errors import UserError


@config
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning on text, prompt-completion pairs, messages or tokenized rows."""

    refused: ClassVar[Mapping[str, Refusal]] = SFT

    learning_rate: float = option(2e-5, minimum=0)
    """AdamW's peak learning rate."""
    dataset_text_field: str = "text"
    """Column of plain-text rows."""
    max_length: int | None = option(1024, minimum=2)
    """Longest sequence in tokens, and the size of a pack; longer rows are cut (None: never)."""
    truncation_mode: str = option("keep_start", choices=("keep_start", "keep_end"))
    """Which part of a row longer than max_length is kept."""
    shuffle_dataset: bool = True
    """Rows in a new random order each epoch; False takes them in order, one global batch after another.
    (TRL's default is False, but its sampler shuffles all the same.)"""
    packing: bool = False
    """Join rows into packs of max_length tokens, so that a microbatch of n rows is n packs. Without it
    batches are packed too, and never padded, but n rows are n rows."""
    packing_strategy: str = option(
        "bfd", choices=("bfd", "bfd_split", "wrapped"), why="its name is bfd_split when it was bfd-requeue"
    )
    """bfd (best fit decreasing, overlong rows cut), bfd_split (overlong rows split) or wrapped (one
    stream)."""
    eval_packing: bool | None = None
    """Packing of the evaluation rows; packing when not given."""
    completion_only_loss: bool | None = None
    """Loss on the completion only; not given: yes where rows have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Loss on the assistant's messages only; needs conversational rows."""
    loss_type: str = option("nll", choices=("nll", "dft"), why="chunked_nll is what nll does here")
    """nll, or dft (each token weighed by its own probability, arXiv 2508.05629)."""

    def validate(self, world_size: int) -> None:
        """Packing needs a length to pack to, and keeps the start of what is longer."""
        super().validate(world_size)
        packs = self.packing or bool(self.eval_packing)
        if self.packing and self.streaming:
            raise UserError(
                "streaming=True reads the rows that max_steps needs, and packing=True leaves open how many those are; "
                "set one of them to False"
            )
        if packs and self.max_length is None:
            raise UserError("packing=True needs max_length, the size of a pack, which is None; give e.g. 1024")
        if packs and self.truncation_mode == "keep_end":
            raise UserError(
                "truncation_mode='keep_end' has no effect on packs: packing_strategy says what becomes of rows longer "
                "than max_length; use keep_start, or packing=False"
            )
