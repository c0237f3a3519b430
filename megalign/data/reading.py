"""Datasets from files, directories and the hub, prepared once for the whole job."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError

from megalign.errors import UserError

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_split(args: Any, split: str) -> Dataset:
    """Rows of one split: of `args.dataset_name` or, for dataset_test_split, of `args.eval_dataset_name` if
    given.
    """
    if split == args.dataset_test_split and args.eval_dataset_name is not None:
        # Rows that were named for evaluation are all meant, whatever their file calls its split.
        return load_rows(args.eval_dataset_name, split=split, field="eval_dataset_name", only_split=True)
    if args.dataset_name is None:
        raise UserError("dataset_name is missing; give a .jsonl or .parquet file, a directory or a hub name")
    return load_rows(args.dataset_name, split=split, field="dataset_name", config=args.dataset_config)


def load_rows(
    name: str,
    *,
    split: str,
    field: str = "dataset_name",
    config: str | None = None,
    only_split: bool = False,
) -> Dataset:
    """A split of a local file, a directory (of such files, or written by save_to_disk) or a hub dataset.

    `field` is what errors call the name. With `only_split` a dataset of a single split gives it, whatever
    its name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _chosen(_read_files(str(path), path.suffix, field), split, f"{field}={name!r}", only_split)
    if path.is_dir():
        return _chosen(_read_directory(path, field), split, f"{field}={name!r}", only_split)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in _READERS:
        raise UserError(f"{field}={name!r} does not exist; give a .jsonl or .parquet file, a directory or a hub name")
    return _from_hub(name, config, split, field, only_split)


def _read_files(path: str, suffix: str, field: str) -> DatasetDict:
    if suffix not in _READERS:
        raise UserError(f"{field}={path!r} ends in {suffix!r}; files that are read end in {', '.join(_READERS)}")
    try:
        return load_dataset(_READERS[suffix], data_files=path)
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{field}={path!r} cannot be read as {_READERS[suffix]}: {reason}") from error


def _read_directory(path: Path, field: str) -> DatasetDict:
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    if (path / "state.json").is_file():
        return DatasetDict({"train": load_from_disk(str(path))})
    suffixes = {file.suffix for file in path.rglob("*") if file.suffix in _READERS}
    if not suffixes:
        raise UserError(f"{field}={str(path)!r} holds no {', '.join(_READERS)} files; name a directory that does")
    try:
        return load_dataset(str(path))
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{field}={str(path)!r} cannot be read: {reason}") from error


def _from_hub(name: str, config: str | None, split: str, field: str, only_split: bool) -> Dataset:
    try:
        builder = load_dataset_builder(name, config)
        builder.download_and_prepare()
    except (OSError, ValueError) as error:  # no such name, no network, no such config
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}={name!r} is no file or directory here, and the hub says: {reason}") from error
    return _chosen(builder.as_dataset(), split, f"{field}={name!r}", only_split)


def _chosen(splits: DatasetDict, split: str, what: str, only_split: bool) -> Dataset:
    if split in splits:
        return splits[split]
    if only_split and len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(
        f"{what} has no split {split!r}, only {', '.join(map(repr, splits))}; dataset_train_split and "
        "dataset_test_split name splits, eval_dataset_name other rows to evaluate on"
    )


def once_per_job(make: Callable[[], Dataset], directory: str) -> Dataset:
    """The dataset that `make` gives, made by rank 0 only; the other ranks map its file into memory.

    Collective over the default process group, when there is one of several ranks. `directory` (output_dir)
    must be one that every rank sees; the rows go to its `.tokenized/`. A UserError of `make` is raised on
    every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    outcome = [("error", "rank 0 failed to prepare the dataset; its own message says why")]
    try:
        if dist.get_rank() == 0:
            outcome = [("path", _saved(make(), Path(directory) / ".tokenized"))]
    except UserError as error:
        outcome = [("error", str(error))]
    finally:  # whatever happened on rank 0, the others are waiting for it
        dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "error":
        raise UserError(value)
    if not Path(value).is_dir():
        raise UserError(f"output_dir={directory!r} is not shared by all nodes ({value} is missing); use one that is")
    return load_from_disk(value)


def _saved(dataset: Dataset, directory: Path) -> str:
    """Saves under the dataset's fingerprint, all at once: a half-written directory never has that name."""
    target = directory / dataset._fingerprint
    if not target.is_dir():
        partial = directory / f"{dataset._fingerprint}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        dataset.save_to_disk(str(partial))
        partial.rename(target)
    return str(target.resolve())
