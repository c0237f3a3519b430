"""Packs: several tokenized rows joined into one of at most max_length tokens, as TRL's strategies join
them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from datasets import Dataset

from megalign.data.rows import ROW_NUMBER

Strategy = Literal["bfd", "bfd_split", "wrapped"]

ROWS_AT_A_TIME = 1000
"""Rows that are packed among themselves: datasets' batch size in map, hence TRL's, so that packs are equal
to TRL's.
"""


class Piece(NamedTuple):
    """Tokens start..stop of a row."""

    row: int
    start: int
    stop: int


def best_fit_decreasing(pieces: Sequence[Piece], max_length: int) -> list[list[Piece]]:
    """Longest first, each into the open pack with the least sufficient space, the oldest of equals (arXiv
    2404.10830).
    """
    packs: list[list[Piece]] = []
    spaces: list[int] = []  # sorted, without repetition
    packs_of_space: dict[int, deque[list[Piece]]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.stop):
        length = piece.stop - piece.start
        place = bisect_left(spaces, length)
        if place == len(spaces):
            pack: list[Piece] = []
            packs.append(pack)
            space = max_length
        else:
            space = spaces[place]
            pack = packs_of_space[space].popleft()
            if not packs_of_space[space]:
                del spaces[place]
        pack.append(piece)
        left = space - length
        if left > 0:
            queue = packs_of_space.setdefault(left, deque())
            if not queue:
                insort(spaces, left)
            queue.append(pack)
    return packs


def row_packs(lengths: Sequence[int], max_length: int, strategy: Strategy) -> list[list[list[Piece]]]:
    """Packs, each a list of sequences, each a list of pieces that are joined (more than one in `wrapped`
    only).
    """
    if strategy == "bfd":
        pieces = [Piece(row, 0, min(length, max_length)) for row, length in enumerate(lengths) if length]
    elif strategy == "bfd_split":
        pieces = [
            Piece(row, start, min(start + max_length, length))
            for row, length in enumerate(lengths)
            for start in range(0, length, max_length)
        ]
    else:
        assert strategy == "wrapped", f"packing_strategy={strategy!r}"
        return [[pack] for pack in _wrapped(lengths, max_length)]
    return [[[piece] for piece in pack] for pack in best_fit_decreasing(pieces, max_length)]


def _wrapped(lengths: Sequence[int], max_length: int) -> list[list[Piece]]:
    """The rows as one stream, cut every max_length tokens."""
    packs: list[list[Piece]] = []
    room = 0
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                packs.append([])
                room = max_length
            stop = min(start + room, length)
            packs[-1].append(Piece(row, start, stop))
            room -= stop - start
            start = stop
    return packs


def pack_dataset(dataset: Dataset, max_length: int, strategy: Strategy) -> Dataset:
    """Rows of input_ids and loss_mask -> packs with the same columns and `seq_lengths`, those of its
    sequences, and with the numbers of the rows that they are made of.

    Every 1000 rows are packed among themselves. In bfd and bfd_split a pack's sequences do not see each
    other; in wrapped a pack is one sequence, whatever rows it was cut from.
    """

    def pack(rows: Mapping[str, list[Any]]) -> dict[str, list[list[Any]]]:
        packs = row_packs([len(ids) for ids in rows["input_ids"]], max_length, strategy)
        packed: dict[str, list[list[Any]]] = {name: [] for name in (*columns, ROW_NUMBER, "seq_lengths")}
        for sequences in packs:
            pieces = [piece for sequence in sequences for piece in sequence]
            for name in columns:
                parts = (rows[name][piece.row][piece.start : piece.stop] for piece in pieces)
                packed[name].append([value for part in parts for value in part])
            packed[ROW_NUMBER].append([rows[ROW_NUMBER][piece.row] for piece in pieces])
            lengths = [sum(piece.stop - piece.start for piece in sequence) for sequence in sequences]
            packed["seq_lengths"].append(lengths)
        return packed

    columns = ["input_ids", "loss_mask"]
    read = [*columns, ROW_NUMBER]
    return dataset.select_columns(read).map(
        pack, batched=True, batch_size=ROWS_AT_A_TIME, remove_columns=read, desc="Packing"
    )


def sequences_of(row: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
    """A prepared row, packed or not -> its sequences, as `collate.pack` takes them."""
    start = 0
    for length in row["seq_lengths"] if "seq_lengths" in row else [len(row["input_ids"])]:
        stop = start + length
        yield {"tokens": row["input_ids"][start:stop], "loss_mask": row["loss_mask"][start:stop]}
        start = stop
