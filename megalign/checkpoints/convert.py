"""The two conversions as whole directories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megalign.checkpoints.checksums import first_fault
from megalign.checkpoints.find import HUGGING_FACE, engine_directory, noted_files, reference_of
from megalign.checkpoints.hf_stream import Entry, split_into_shards, write_shard
from megalign.checkpoints.job import Job, Meter
from megalign.checkpoints.stored import extra_states, layers_are_numbered
from megalign.checkpoints.to_hf import HfTensors
from megalign.checkpoints.to_megatron import chunks_of
from megalign.checkpoints.writer import write_checkpoint
from megalign.conversion.architecture import Architecture
from megalign.conversion.families import architecture_of, exported_config
from megalign.conversion.hf_checks import check_directory
from megalign.conversion.hf_config import write_companions
from megalign.conversion.hf_files import HfReader, read_config
from megalign.conversion.hf_writer import HfDirectory, parse_size
from megalign.errors import UserError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_of(name: str | None) -> torch.dtype | None:
    """An option's; None: each tensor keeps its own."""
    return None if name is None else _DTYPES[name]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copies of some megabytes: torch's other threads would wait, busily, more than they copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def hf_to_megatron(hf: Path, output: Path, dtype: torch.dtype | None = None) -> None:
    """Writes `output`, which any Megatron-Core program loads at any layout; a collective over the job."""
    job = Job()
    reader = HfReader(hf)
    architecture = architecture_of(reader.config)
    check_directory(reader, architecture)
    chunks = list(chunks_of(reader, architecture, dtype))
    mine = [chunks[number] for number in job.share([chunk.nbytes for chunk in chunks])]
    with job.output(output) as partial, Meter(job, str(output), sum(chunk.nbytes for chunk in mine)) as meter:
        if job.rank == 0:
            (partial / HUGGING_FACE).mkdir()
            changes = exported_config(reader.config, architecture, None)
            write_companions(hf, partial / HUGGING_FACE, config_changes=changes, dtype=dtype)
        write_checkpoint(partial, mine, extra_states(architecture), _common(architecture), meter.written)


@_one_thread()
def megatron_to_hf(
    checkpoint: Path,
    output: Path,
    reference: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> dict[str, int]:
    """Writes `output`; a collective. Returns, by name, how many rows behind the vocabulary were left out."""
    job, max_bytes = Job(), parse_size(max_shard_size)
    directory = engine_directory(checkpoint)
    with job.claimed(output):
        check_files(directory, job)
        source = reference_of(directory, reference)
        config = read_config(source)
        architecture = architecture_of(config)
        tensors = HfTensors(directory, architecture)
        entries = [Entry(name, shape, tensors.dtype(name, dtype)) for name, shape in tensors.shapes().items()]
        shards = split_into_shards(entries, max_bytes)
        target = _begin(job, output, source, exported_config(config, architecture, None))
        _write_share(job, target, shards, tensors, dtype)
        job.barrier()
        if job.rank == 0:
            kind = Counter(entry.dtype for entry in entries).most_common(1)[0][0]
            names = [[entry.name for entry in shard] for shard in shards]
            target.finish(names, sum(entry.nbytes for entry in entries), kind)
        job.barrier()
    return tensors.index.pad_rows


def check_files(directory: Path, job: Job) -> None:
    """Raises unless each file is what its trainer noted of it, if one did; each rank reads a share. A collective."""
    files = noted_files(directory)
    if not files:
        return
    mine = [files[number] for number in job.share([then["bytes"] for _, then in files])]
    fault = None
    with Meter(job, f"checksums of {directory}", sum(then["bytes"] for _, then in mine)) as meter:
        for file, then in mine:
            fault = fault or first_fault([(file, then)])
            meter.written(then["bytes"])
    if (told := job.first_told(fault)) is not None:
        raise UserError(f"{told}; use another checkpoint")


def _begin(job: Job, output: Path, source: Path, changes: dict[str, Any]) -> HfDirectory:
    target = HfDirectory(output, source, config_changes=changes)
    if job.rank == 0:
        target.begin()
    job.barrier()
    return target


def _write_share(
    job: Job, target: HfDirectory, shards: list[list[Entry]], tensors: HfTensors, dtype: torch.dtype | None
) -> None:
    mine = job.share([sum(entry.nbytes for entry in shard) for shard in shards])
    with Meter(job, str(target.path), sum(entry.nbytes for number in mine for entry in shards[number])) as meter:
        for number in mine:
            with target.told():
                write_shard(
                    target.shard_file(number),
                    shards[number],
                    lambda name: tensors.blocks(name, dtype),
                    meter.written,
                    tensors.reader.run_of,
                )


def _common(architecture: Architecture) -> dict[str, Any]:
    """Beside the tensors: how they are named, for programs that ask, and what Megatron-LM wants to know of any."""
    content = {"singleton_local_shards": False, "non_homogeneous_layers": layers_are_numbered(architecture)}
    return {"content_metadata": content, "checkpoint_version": 3.0, "iteration": 0}
