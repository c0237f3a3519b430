"""Which rows come when, and which rank takes which: the same global batches at every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megalign.errors import UserError


class EpochSampler:
    """Global batches of row numbers, epoch after epoch without end; `state` says where it stands.

    shuffle=False takes rows in order. Otherwise epoch e is torch.randperm from seed + e, as Hugging Face's
    trainer draws it; with `keep_batches` the same of whole batches of neighbours. The last batch of an epoch holds the
    rows that are left, or is dropped (drop_last, TRL's way for GRPO).
    """

    def __init__(
        self,
        num_rows: int,
        global_batch: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        keep_batches: bool = False,
    ) -> None:
        if num_rows < (global_batch if drop_last else 1):
            raise UserError(
                f"the dataset has {num_rows} rows and a batch takes {global_batch if drop_last else 1}; "
                "give more rows or a smaller batch"
            )
        self.num_rows, self.global_batch = num_rows, global_batch
        self.seed, self.shuffle, self.drop_last, self.keep_batches = seed, shuffle, drop_last, keep_batches
        self.epoch = 0
        self.position = 0  # batches of this epoch that are already taken
        self._order: tuple[int, list[int]] | None = None  # of one epoch

    @property
    def batches_per_epoch(self) -> int:
        whole, rest = divmod(self.num_rows, self.global_batch)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """The next global batch; the epoch turns when the batch after its last is asked for."""
        if self.position == self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        start = self.position * self.global_batch
        self.position += 1
        return self.order(self.epoch)[start : start + self.global_batch]

    def order(self, epoch: int) -> list[int]:
        """All rows in the epoch's order."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._drawn(epoch) if self.shuffle else list(range(self.num_rows)))
        return self._order[1]

    def _drawn(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if not self.keep_batches:
            return torch.randperm(self.num_rows, generator=generator).tolist()
        whole, size = self.num_rows // self.global_batch, self.global_batch
        starts = [batch * size for batch in torch.randperm(whole, generator=generator).tolist()]
        rows = [row for start in starts for row in range(start, start + size)]
        return [*rows, *range(whole * size, self.num_rows)]  # a short batch stays the last

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps: the epoch, and the batches of it that were taken."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]


def shard(rows: Sequence[int], *, dp_rank: int, dp_size: int, micro_batch: int) -> list[list[int]]:
    """A rank's microbatches of one global batch: microbatch m of rank d is the (m * dp_size + d)-th slice
    of it.

    A short last batch goes out in smaller slices, so that ranks share what is left; no row is lost or
    repeated. A rank that gets none has one empty microbatch, since every rank has to take part in the step.
    """
    stride = dp_size * micro_batch
    microbatches = []
    for start in range(0, len(rows), stride):
        slices = _slices(rows[start : start + stride], dp_size, micro_batch)
        microbatches.append(slices[dp_rank])
    return [microbatch for microbatch in microbatches if microbatch] or [[]]


def _slices(rows: Sequence[int], dp_size: int, micro_batch: int) -> list[list[int]]:
    if len(rows) == dp_size * micro_batch:
        sizes = [micro_batch] * dp_size
    else:
        base, more = divmod(len(rows), dp_size)
        sizes = [base + (1 if rank < more else 0) for rank in range(dp_size)]
    bounds = [sum(sizes[:rank]) for rank in range(dp_size + 1)]
    return [list(rows[bounds[rank] : bounds[rank + 1]]) for rank in range(dp_size)]
