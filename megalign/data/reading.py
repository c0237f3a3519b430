"""Datasets from files, directories and the hub, prepared once for the whole job."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from megalign import failure
from megalign.errors import UserError

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_turns = itertools.count()  # of once_per_job: every rank has the same calls in the same order


Rows = Dataset | IterableDataset  # the latter with streaming=True
Splits = Mapping[str, Rows]


def load_split(args: Any, split: str) -> Rows:
    """Rows of one split: of `args.dataset_name` or, for dataset_test_split, of `args.eval_dataset_name` if
    given.

    Several names are mixed: the training split by dataset_weights, any other one after another.
    """
    if split == args.dataset_test_split and args.eval_dataset_name is not None:
        # Rows that were named for evaluation are all meant, whatever their file calls its split.
        name, field = args.eval_dataset_name, "eval_dataset_name"
        return load_rows(name, split=split, field=field, only_split=True, streaming=args.streaming)
    if not args.dataset_name:
        raise UserError("dataset_name is missing; give a .jsonl or .parquet file, a directory or a hub name")
    names = [args.dataset_name] if isinstance(args.dataset_name, str) else args.dataset_name
    parts = {name: load_rows(name, split=split, config=args.dataset_config, streaming=args.streaming) for name in names}
    if len(names) == 1:
        return parts[names[0]]
    weights = args.dataset_weights if split == args.dataset_train_split else None
    return mixed([parts[name] for name in names], names, weights=weights, seed=args.data_order_seed)


def load_rows(
    name: str,
    *,
    split: str,
    field: str = "dataset_name",
    config: str | None = None,
    only_split: bool = False,
    streaming: bool = False,
) -> Rows:
    """A split of a local file, a directory (of such files, or written by save_to_disk) or a hub dataset.

    `field` is what errors call the name. With `only_split` a dataset of a single split gives it, whatever
    its name. With `streaming` rows are read when they are asked for.
    """
    path = Path(name).expanduser()
    if path.is_file():
        _refuse_config(config, f"{field}={name!r} is a file")
        splits = _read_files(str(path), path.suffix, field, streaming)
    elif path.is_dir():
        splits = _read_directory(path, config, field, streaming)
    elif path.is_absolute() or name.startswith((".", "~")) or path.suffix in _READERS:
        raise UserError(f"{field}={name!r} does not exist; give a .jsonl or .parquet file, a directory or a hub name")
    else:
        splits = _from_hub(name, config, field, streaming)
    return _chosen(splits, split, f"{field}={name!r}", only_split)


def _read_files(path: str, suffix: str, field: str, streaming: bool) -> Splits:
    if suffix not in _READERS:
        raise UserError(f"{field}={path!r} ends in {suffix!r}; files that are read end in {', '.join(_READERS)}")
    try:
        return load_dataset(_READERS[suffix], data_files=path, streaming=streaming)
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{field}={path!r} cannot be read as {_READERS[suffix]}: {reason}") from error


def _refuse_config(config: str | None, what: str) -> None:
    if config is not None:
        raise UserError(
            f"dataset_config={config!r} chooses among the configurations of a hub dataset or of a directory whose "
            f"README.md lists some, and {what}; leave it out"
        )


def _read_directory(path: Path, config: str | None, field: str, streaming: bool) -> Splits:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _refuse_config(config, f"{field}={str(path)!r} was written by save_to_disk")
        saved = load_from_disk(str(path))
        splits = {"train": saved} if isinstance(saved, Dataset) else saved
        return {split: rows.to_iterable_dataset() for split, rows in splits.items()} if streaming else splits
    suffixes = {file.suffix for file in path.rglob("*") if file.suffix in _READERS}
    if not suffixes:
        raise UserError(f"{field}={str(path)!r} holds no {', '.join(_READERS)} files; name a directory that does")
    try:
        return load_dataset(str(path), config, streaming=streaming)
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{field}={str(path)!r} cannot be read: {reason}") from error
    except ValueError as error:  # it has several configurations and none is named, or none of this name
        reason = " ".join(str(error).strip().splitlines()[:2])  # the second line lists them
        raise UserError(f"{field}={str(path)!r} with dataset_config={config!r} cannot be read: {reason}") from error


def _from_hub(name: str, config: str | None, field: str, streaming: bool) -> Splits:
    try:
        builder = load_dataset_builder(name, config)
        if streaming:
            return builder.as_streaming_dataset()
        builder.download_and_prepare()
    except (OSError, ValueError) as error:  # no such name, no network, no such config
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}={name!r} is no file or directory here, and the hub says: {reason}") from error
    return builder.as_dataset()


def _chosen(splits: Splits, split: str, what: str, only_split: bool) -> Rows:
    if split in splits:
        return splits[split]
    if only_split and len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(
        f"{what} has no split {split!r}, only {', '.join(map(repr, splits))}; dataset_train_split and "
        "dataset_test_split name splits, eval_dataset_name other rows to evaluate on"
    )


# ---- several datasets, streams


def mixed(parts: Sequence[Rows], names: Sequence[str], *, weights: Sequence[float] | None, seed: int) -> Rows:
    """The rows of all parts: one part after another or, with weights, each row from a part drawn with these
    probabilities, until every part has been read whole; a part that ends sooner starts again.

    `names` are what errors call the parts.
    """
    first, *others = [_columns(part, name) for part, name in zip(parts, names, strict=True)]
    for columns, name in zip(others, names[1:], strict=True):
        if set(columns) != set(first):
            raise UserError(
                f"dataset_name mixes {names[0]!r}, whose columns are {', '.join(map(repr, first))}, with {name!r}, "
                f"whose columns are {', '.join(map(repr, columns))}; bring them to the same columns"
            )
    try:
        if weights is None:
            return concatenate_datasets(list(parts))
        shares = [weight / sum(weights) for weight in weights]
        return interleave_datasets(list(parts), shares, seed=seed, stopping_strategy="all_exhausted")
    except ValueError as error:  # the same column holds text here and a list there
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"dataset_name {', '.join(map(repr, names))} do not go together: {reason}") from error


def _columns(part: Rows, name: str) -> list[str]:
    """Those of the part's first row; a part without rows is refused."""
    for row in part:
        return list(row)
    raise UserError(f"dataset_name {name!r} has no rows to mix; drop it")


def take_rows(stream: IterableDataset, count: int | None, *, shuffle: bool = False, seed: int = 0) -> Dataset:
    """The first `count` rows of a stream, or all that it has, held in memory; `shuffle` is datasets' own, within a
    buffer of 1000 rows.

    A run of max_steps needs max_steps times the rows of a step. A stream that ends before is gone through again,
    epoch after epoch, like any dataset.
    """
    stream = stream.shuffle(seed=seed) if shuffle else stream
    try:
        rows = list(islice(stream, count))
        return as_table(rows, features=stream.features)
    except ValueError as error:  # pyarrow's: a line that is no JSON, a column that changes its type
        raise UserError(f"the streamed rows cannot be read: {str(error).strip().splitlines()[0]}") from error


def as_table(rows: Sequence[Mapping[str, Any]], *, features: Features | None = None) -> Dataset:
    """Rows as a dataset with the columns of all of them; a row without a column has None there."""
    names = features or dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, features=features)


# ---- once for the job


def of_this_code(dataset: Dataset) -> Dataset:
    """The same rows under a fingerprint that changes with the code of this room.

    `datasets` names the cached results of map and filter by fingerprints that follow from one another and, of an
    importable function, know only the name: rows prepared by an earlier version would be taken for this one's.
    """
    renamed = copy.copy(dataset)
    renamed._fingerprint = Hasher.hash([dataset._fingerprint, code_digest()])
    return renamed


@functools.cache
def code_digest() -> str:
    """Of the source files that turn rows into tokens."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def once_per_job(make: Callable[[], Dataset], directory: str) -> Dataset:
    """The dataset that `make` gives, made by rank 0 only; the other ranks map its file into memory.

    Collective over the default process group, when there is one of several ranks. `directory` (output_dir)
    must be one that every rank sees; the rows go to its `.tokenized/`. A UserError of `make` is raised on
    every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    outcome = [("error", "rank 0 failed to prepare the dataset; its own message says why")]
    ready = f"megalign/rows/{next(_turns)}"
    try:
        if dist.get_rank() == 0:
            outcome = [("path", _saved(make(), Path(directory) / ".tokenized"))]
        else:
            _wait_for(ready)
    except UserError as error:
        outcome = [("error", str(error))]
    finally:  # whatever happened on rank 0, the others are waiting for it
        if dist.get_rank() == 0:
            failure.default_store().set(ready, "")
        dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "error":
        raise UserError(value)
    if not Path(value).is_dir():
        raise UserError(f"output_dir={directory!r} is not shared by all nodes ({value} is missing); use one that is")
    return load_from_disk(value)


def _wait_for(key: str) -> None:
    """Returns when another rank has set the key in the job's store, however long that takes.

    A collective would give up after ddp_timeout, and rows may take hours to tokenize. A rank 0 that dies takes its
    store or, through its launcher, this process with it.
    """
    store, pause = failure.default_store(), 0.05
    while not store.check([key]) and not failure.another_rank_reported():
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _saved(dataset: Dataset, directory: Path) -> str:
    """Saves under the dataset's fingerprint, all at once: a half-written directory never has that name."""
    target = directory / dataset._fingerprint
    if not target.is_dir():
        partial = directory / f"{dataset._fingerprint}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        dataset.save_to_disk(str(partial))
        partial.rename(target)
    return str(target.resolve())
