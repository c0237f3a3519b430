"""Rows prepared once for the job: made by rank 0, mapped into memory by all, known again by what made them."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher

from megalign import failure
from megalign.data.rows import without_numbers
from megalign.errors import UserError

DIRECTORY = ".tokenized"  # in output_dir
_turns = itertools.count()  # of once_per_job: every rank has the same calls in the same order


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
            outcome = [("path", _saved(make(), Path(directory) / DIRECTORY))]
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
        pause = min(2 * pause, 0.5)  # rank 0 is in a collective by now, which has its own limit


def _saved(dataset: Dataset, directory: Path) -> str:
    """Saves under the dataset's fingerprint, all at once: a half-written directory never has that name."""
    target = directory / dataset._fingerprint
    if not target.is_dir():
        partial = directory / f"{dataset._fingerprint}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        dataset.save_to_disk(str(partial))
        partial.rename(target)
    return str(target.resolve())


def in_memory(rows: Any) -> Any:
    """Rows that were loaded from a directory (None, one Dataset or a mapping of them), without it."""
    if rows is None:
        return None
    if isinstance(rows, Mapping):
        return {name: in_memory(part) for name, part in rows.items()}
    files = rows.cache_files
    return load_from_disk(str(Path(files[0]["filename"]).parent), keep_in_memory=True) if files else rows


def remove(directory: str) -> None:
    """Leaves `directory` without the files through which the rows were handed out."""
    shutil.rmtree(Path(directory) / DIRECTORY, ignore_errors=True)


# ---- what rows are known by


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


def describe_rows(rows: Dataset) -> str:
    """The number of rows and a short digest of all of them; it takes some 0.3 s for a million tokens.

    Of what is learnt from: a row that was left out may be gone from the file when the run goes on.
    """
    digest = hashlib.sha256()
    # As values, not as Arrow's buffers: these also hold what lies beside the rows.
    for part in without_numbers(rows).with_format("arrow").iter(1000):
        digest.update(json.dumps(part.to_pylist(), default=str, sort_keys=True).encode())
    return f"{len(rows)} rows {digest.hexdigest()[:8]}"
