"""Datasets from files, directories and the hub, prepared once for the whole job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from pyarrow.lib import ArrowException
from yaml import YAMLError

from megalign.data.broken import BROKEN
from megalign.data.json_lines import first_broken_line, rows_of_lines
from megalign.data.table import as_table, reason_of
from megalign.errors import UserError

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


# Of files about the rows (state.json, README.md) that are none, and of a loading script, which datasets refuses to run.
_TORN = (ArrowException, OSError, LookupError, TypeError, AttributeError, RuntimeError)
# What datasets raises for files that it cannot read: StopIteration is an empty one, ValueErrors are pyarrow's too.
UNREADABLE = (DatasetGenerationError, StopIteration, ValueError)

Rows = Dataset | IterableDataset  # the latter with streaming=True
Splits = Mapping[str, Rows]


def load_split(args: Any, split: str, *, for_evaluation: bool = False) -> Rows:
    """Rows of one split: of `args.dataset_name` or, for evaluation, of `args.eval_dataset_name` if given.

    Several names are mixed: rows to train on by dataset_weights, rows to evaluate on one after another. The split's
    name says nothing of its use: the two splits may have the same name.
    """
    how = {"streaming": args.streaming, "skip_bad_rows": args.skip_bad_rows}
    if for_evaluation and args.eval_dataset_name is not None:
        # Rows that were named for evaluation are all meant, whatever their file calls its split.
        return load_rows(args.eval_dataset_name, split=split, field="eval_dataset_name", only_split=True, **how)
    if not args.dataset_name:
        raise UserError("dataset_name is missing; give a .jsonl or .parquet file, a directory or a hub name")
    names = [args.dataset_name] if isinstance(args.dataset_name, str) else args.dataset_name
    parts = {name: load_rows(name, split=split, config=args.dataset_config, **how) for name in names}
    if len(names) == 1:
        return parts[names[0]]
    weights = None if for_evaluation else args.dataset_weights
    return mixed([parts[name] for name in names], names, weights=weights, seed=args.data_order_seed)


def load_rows(
    name: str,
    *,
    split: str,
    field: str = "dataset_name",
    config: str | None = None,
    only_split: bool = False,
    streaming: bool = False,
    skip_bad_rows: bool = False,
) -> Rows:
    """A split of a local file, a directory (of such files, or written by save_to_disk) or a hub dataset.

    `field` is what errors call the name. With `only_split` a dataset of a single split gives it, whatever
    its name. With `streaming` rows are read when they are asked for. With `skip_bad_rows` a line of a .jsonl
    file that is no row says so in a column of its own (BROKEN).
    """
    path = Path(name).expanduser()
    if path.is_file():
        _refuse_config(config, f"{field}={name!r} is a file")
        splits = _read_files(str(path), path.suffix, field, streaming, skip_bad_rows)
    elif path.is_dir():
        splits = _read_directory(path, config, field, streaming)
    elif path.is_absolute() or name.startswith((".", "~")) or path.suffix in _READERS:
        raise UserError(f"{field}={name!r} does not exist; give a .jsonl or .parquet file, a directory or a hub name")
    else:
        splits = _from_hub(name, config, field, streaming)
    return _chosen(splits, split, f"{field}={name!r}", only_split)


def _read_files(path: str, suffix: str, field: str, streaming: bool, skip_bad_rows: bool) -> Splits:
    if suffix not in _READERS:
        raise UserError(f"{field}={path!r} ends in {suffix!r}; files that are read end in {', '.join(_READERS)}")
    if suffix == ".jsonl" and skip_bad_rows and first_broken_line(path) is not None:
        if streaming:
            return {"train": IterableDataset.from_generator(rows_of_lines, gen_kwargs={"path": path})}
        return {"train": as_table(list(rows_of_lines(path)), skip_bad_rows=True)}
    try:
        return load_dataset(_READERS[suffix], data_files=path, streaming=streaming)
    except UNREADABLE as error:
        line = first_broken_line(path) if suffix == ".jsonl" else None
        skip = "" if line is None else ", or leave such lines out with skip_bad_rows"
        raise UserError(
            f"{field}={path!r} cannot be read as {_READERS[suffix]}: {line or reason_of(error)}; mend or replace the "
            f"file{skip}"
        ) from error


def _refuse_config(config: str | None, what: str) -> None:
    if config is not None:
        raise UserError(
            f"dataset_config={config!r} chooses among the configurations of a hub dataset or of a directory whose "
            f"README.md lists some, and {what}; leave it out"
        )


def _read_directory(path: Path, config: str | None, field: str, streaming: bool) -> Splits:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _refuse_config(config, f"{field}={str(path)!r} was written by save_to_disk")
        saved = _saved(path, field)
        splits = {"train": saved} if isinstance(saved, Dataset) else saved
        return {split: rows.to_iterable_dataset() for split, rows in splits.items()} if streaming else splits
    suffixes = {file.suffix for file in path.rglob("*") if file.suffix in _READERS}
    if not suffixes:
        raise UserError(f"{field}={str(path)!r} holds no {', '.join(_READERS)} files; name a directory that does")
    try:
        return load_dataset(str(path), config, streaming=streaming)
    except (*_TORN, DatasetGenerationError, StopIteration, YAMLError) as error:
        raise UserError(
            f"{field}={str(path)!r} cannot be read: {reason_of(error)}; mend or replace its files"
        ) from error
    except ValueError as error:
        if reason_of(error) == "it holds no rows":
            raise UserError(f"{field}={str(path)!r} cannot be read: it holds no rows; replace its files") from error
        # It has several configurations and none is named, or none of this name.
        reason = " ".join(str(error).strip().splitlines()[:2])  # the second line lists them
        raise UserError(f"{field}={str(path)!r} with dataset_config={config!r} cannot be read: {reason}") from error


def _saved(path: Path, field: str) -> Dataset | DatasetDict:
    try:
        return load_from_disk(str(path))
    except (*_TORN, ValueError) as error:
        raise UserError(
            f"{field}={str(path)!r} was written by save_to_disk and cannot be read ({type(error).__name__}: "
            f"{reason_of(error)}); write it anew or copy it again"
        ) from error


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


# ---- several datasets


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
        return [column for column in row if column != BROKEN]
    raise UserError(f"dataset_name {name!r} has no rows to mix; drop it")
