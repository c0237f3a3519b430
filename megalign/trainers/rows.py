"""Rows: what turns the datasets that a trainer is given into the batches of its ranks, in the order of this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from megalign.batch import Batch
from megalign.conversion.architecture import Architecture
from megalign.conversion.flops import forward_flops
from megalign.data import prepared
from megalign.data.balance import Budget
from megalign.data.broken import Skipped
from megalign.data.collate import packed_share
from megalign.data.rows import ROW_NUMBER, numbers_of
from megalign.data.sampler import EpochSampler
from megalign.data.table import as_table, take_rows
from megalign.errors import UserError
from megalign.parallel.control import barrier, gather_objects
from megalign.parallel.groups import ParallelGroups

TRAIN, EVALUATION = "train_dataset", "eval_dataset"  # as the constructor calls them


class Tokenized(Protocol):
    """The rows that a trainer works on, without those that `skipped` notes, if given."""

    def __call__(self, dataset: Dataset, *, for_evaluation: bool, skipped: Skipped | None = None) -> Dataset: ...


def as_dataset(
    dataset: Any,
    name: str,
    *,
    count: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> Dataset:
    """A datasets.Dataset as it is, a list of rows as one, or the first `count` rows of a stream.

    `count` is what max_steps will take: max_steps times the rows of a step; an evaluation stream is read whole.
    With `skip_bad_rows` a row that does not go into a table with the others says so in a column of its own (BROKEN).
    """
    if isinstance(dataset, IterableDataset):
        if count is None and name == TRAIN:
            raise UserError(
                "train_dataset is an IterableDataset and max_steps, which says how many of its rows are read, is not "
                "set (or packing=True leaves it open); set max_steps, or give a Dataset or a list"
            )
        return take_rows(dataset, count, shuffle=shuffle, seed=seed, skip_bad_rows=skip_bad_rows)
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise UserError(
            f"{name} is a {type(dataset).__name__} of {', '.join(map(str, dataset))}; give one of its splits"
        )
    if isinstance(dataset, Dataset):
        return _read_once(dataset)
    if isinstance(dataset, Sequence) and all(isinstance(row, Mapping) for row in dataset):
        return as_table(dataset, skip_bad_rows=skip_bad_rows)
    raise UserError(f"{name} is a {type(dataset).__name__}; give a datasets.Dataset or a list of dicts")


def _read_once(dataset: Dataset) -> Dataset:
    """With what its with_transform makes of the rows now: the prompt that is sampled from and the one that is rewarded
    must be of one reading, also where the transform draws."""
    if dataset.format["type"] != "custom":
        return dataset
    options = {"remove_columns": dataset.column_names, "load_from_cache_file": False, "desc": "Reading rows"}
    return dataset.map(dict, **options).with_format(None)


class Rows:
    """The rows of one trainer, which says what a row is made into; every method is called on all ranks."""

    num_skipped = 0  # rows of train_dataset that skip_bad_rows has left out

    def __init__(self, args: Any, groups: ParallelGroups, architecture: Architecture) -> None:
        self._args, self._groups, self._architecture = args, groups, architecture

    def prepared(self, dataset: Any, name: str, tokenized: Tokenized, count: Callable[[], int | None]) -> Dataset:
        """What `tokenized` makes of the dataset, once in the job; of a stream to train on, of its first `count`."""
        skipped = Skipped() if self._args.skip_bad_rows else None
        rows = prepared.once_per_job(
            lambda: tokenized(
                prepared.of_this_code(self._as_dataset(dataset, name, count)),
                for_evaluation=name == EVALUATION,
                skipped=skipped,
            ),
            self._args.output_dir,
        )
        if skipped is not None and name == TRAIN:  # the rank that has prepared them knows
            self.num_skipped = gather_objects(skipped.count, self._groups.world)[0]
        return rows

    def _as_dataset(self, dataset: Any, name: str, count: Callable[[], int | None]) -> Dataset:
        if name == EVALUATION:
            return as_dataset(dataset, name, skip_bad_rows=self._args.skip_bad_rows)
        order = {
            "shuffle": self._args.shuffle_dataset,
            "seed": self._args.data_order_seed,
            "skip_bad_rows": self._args.skip_bad_rows,
        }
        return as_dataset(dataset, name, count=count(), **order)

    def without_files(self, rows: Any) -> Any:
        """The prepared `rows` in memory; output_dir is left without the files through which rank 0 handed them out."""
        if self._groups.world.size == 1:
            return rows
        # Mapped files outlive their names, but not on another node; evaluate() is often called after train().
        rows = prepared.in_memory(rows)
        barrier(self._groups.world)
        if self._groups.world.rank == 0:
            prepared.remove(self._args.output_dir)
        return rows

    def sampler(
        self,
        num_rows: int,
        size: int,
        *,
        epoch: int,
        position: int,
        drop_last: bool = False,
        keep_batches: bool = False,
    ) -> EpochSampler:
        """Global batches of `size` of the rows, from the epoch's batch number `position` on."""
        sampler = EpochSampler(
            num_rows,
            size,
            seed=self._args.data_order_seed,
            shuffle=self._args.shuffle_dataset,
            drop_last=drop_last,
            keep_batches=keep_batches,
        )
        sampler.load_state_dict({"epoch": epoch, "position": position})
        return sampler

    def budget(self, *, shares_prefixes: bool) -> Budget | None:
        """How a step's rows are dealt out to an engine that shares prefixes or does not; None without
        max_tokens_per_microbatch."""
        tokens, architecture = self._args.max_tokens_per_microbatch, self._architecture
        if tokens is None:
            return None
        return Budget(tokens, lambda length: forward_flops(architecture, [length], 0), shares_prefixes)


class NumberedShare(NamedTuple):
    """What a data-parallel rank has of a global batch."""

    batches: list[Batch]  # which say the rows of the user's dataset that they are of
    imbalance: float | None  # of all ranks, where rows were dealt out by cost: balance.imbalance


def numbered_share(
    dataset: Dataset,
    rows: Sequence[int],
    sequences: Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]],
    groups: ParallelGroups,
    *,
    micro_batch: int,
    budget: Budget | None = None,
) -> NumberedShare:
    """This rank's part of the global batch `rows` of a prepared dataset; `sequences` gives those of some rows."""
    share = packed_share(
        rows,
        lambda part: sequences([dataset[row] for row in part]),
        groups,
        micro_batch=micro_batch,
        budget=budget,
    )
    numbered = dataset.select_columns(ROW_NUMBER)
    batches = [
        replace(batch, rows=tuple(number for row in part for number in numbers_of(numbered[row])))
        for part, batch in share.microbatches
    ]
    return NumberedShare(batches, share.imbalance)
