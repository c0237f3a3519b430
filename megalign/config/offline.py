"""What the configs of trainers that learn from prepared rows share: how rows become tokens."""

from __future__ import annotations

from megalign.config.base import config
from megalign.config.loop import LoopConfig
from megalign.config.parallel import ParallelConfig
from megalign.config.values import option


@config
class OfflineConfig(LoopConfig, ParallelConfig):
    """Rows and how they become tokens."""

    chat_template_path: str | None = None
    """A .jinja file, or a directory or hub name of a tokenizer, whose chat template replaces the model's."""
    dataset_num_proc: int | None = option(None, minimum=1)
    """Processes that tokenize the rows."""
    eos_token: str | None = None
    """Token that ends a sequence, where it is not the tokenizer's own."""
    max_length: int | None = option(1024, minimum=2)
    """Longest sequence in tokens; longer rows are cut, or left out where nothing would be left to learn of (None:
    never)."""
    shuffle_dataset: bool = True
    """Rows in a new random order each epoch; False takes them in order, one global batch after another."""
