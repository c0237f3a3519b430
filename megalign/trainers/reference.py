"""Reference: the frozen model that preference losses and KL terms compare with; its logprobs are columns."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, concatenate_datasets, load_from_disk

from megalign.batch import Batch
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_files import HfReader
from megalign.data.collate import packed_share
from megalign.data.rows import ROW_NUMBER, without_numbers
from megalign.errors import UserError
from megalign.parallel.control import barrier, from_first
from megalign.parallel.groups import ParallelGroups
from megalign.parallel.reduce import gather_rows
from megalign.rollout.engine import awake
from megalign.train_engine import TrainEngine

DIRECTORY = "reference_logprobs"  # in output_dir
_TENSORS, _WEIGHTS = 2048, 1024  # tensors that describe_weights looks into, and how many weights of one, at most
RowSequence = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # one sequence of a prepared row


class Reference:
    """A frozen engine that is loaded when it is first needed, and what is asked of it."""

    def __init__(self, model_path: str, args: Any, groups: ParallelGroups) -> None:
        self.model_path, self._args, self._groups = model_path, args, groups
        self._engine: TrainEngine | None = None

    @property
    def engine(self) -> TrainEngine:
        """The model on the ranks; a collective the first time."""
        if self._engine is None:
            self._engine = TrainEngine(self.model_path, self._args, self._groups, trainable=False)
            self._engine.sleep()
        return self._engine

    @cached_property
    def described(self) -> str:
        """By what another model under the same name is noticed, and the same one elsewhere is not; a collective."""
        return from_first(lambda: describe_weights(self.model_path), self._groups.world)

    def release(self) -> None:
        """Lets go of the weights: nobody needs them while all logprobs are columns of the rows."""
        self._engine = None

    def with_logprobs(self, batches: list[Batch]) -> list[Batch]:
        """The batches with `ref_logprobs` [T], on the CPU, where batches wait for their step."""
        with awake(self.engine):
            outputs = self.engine.forward(batches)
        return [
            batch.with_token_columns(ref_logprobs=output["logprobs"].cpu())
            for batch, output in zip(batches, outputs, strict=True)
        ]

    def follow(self, policy: TrainEngine, step: int) -> None:
        """sync_ref_model: every ref_model_sync_steps the reference moves towards the policy (arXiv 2404.09656)."""
        if not self._args.sync_ref_model or step % self._args.ref_model_sync_steps:
            return
        with policy.kept_as_it_was(), self.engine.kept_as_it_was():
            self.engine.mix_in(policy, self._args.ref_model_mixup_alpha)

    # ---- precompute_ref_log_probs

    def precomputed(self, dataset: Dataset, columns: Mapping[str, RowSequence], batch_size: int) -> Dataset:
        """The rows with a list column of logprobs for each of `columns`, computed once and kept in output_dir.

        A column's function says which of the row's sequences it is of. Collective; `dataset` must be the same on
        every rank. Rows that are numbered otherwise than when the logprobs were computed keep their numbers.
        """
        numbers, dataset = dataset.select_columns(ROW_NUMBER), without_numbers(dataset)
        path, is_there = self._place(dataset, columns)
        if not is_there:
            found = {name: self._logprobs(dataset, sequence, batch_size) for name, sequence in columns.items()}
            if self._groups.world.rank == 0:
                _write(path, dataset, found)
            barrier(self._groups.world)
        if not path.is_dir():
            raise UserError(
                f"output_dir={self._args.output_dir!r} is not shared by all nodes ({path} is missing); use one that is"
            )
        return concatenate_datasets([load_from_disk(str(path)), numbers], axis=1)

    def _key(self, dataset: Dataset, columns: Mapping[str, RowSequence]) -> str:
        """Changes with the rows, the model's files and the dtype: stale logprobs are never taken for fresh ones."""
        files = sorted(file for file in Path(self.model_path).iterdir() if file.is_file())
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        facts = [_content(dataset), str(Path(self.model_path).resolve()), stats, self._args.params_dtype_name]
        return hashlib.sha256(json.dumps([*facts, sorted(columns)]).encode()).hexdigest()[:16]

    def _place(self, dataset: Dataset, columns: Mapping[str, RowSequence]) -> tuple[Path, bool]:
        """The directory, and whether it is whole: as rank 0 sees the model's files and the shared file system."""
        world, told = self._groups.world, [("", False)]
        if world.rank == 0:
            path = Path(self._args.output_dir) / DIRECTORY / self._key(dataset, columns)
            told = [(str(path), path.is_dir())]
        if world.size > 1:
            dist.broadcast_object_list(told, src=world.ranks[0], group=world.group)
        return Path(told[0][0]), told[0][1]

    def _logprobs(self, dataset: Dataset, sequence: RowSequence, batch_size: int) -> list[list[float]]:
        """The logprobs of each row's sequence, on every rank."""

        def sequences_of(part: list[int]) -> list[Mapping[str, Any]]:
            return [sequence(dataset[row]) for row in part]

        share = packed_share(range(len(dataset)), sequences_of, self._groups, micro_batch=batch_size)
        batches = self.with_logprobs([batch for _, batch in share.microbatches])
        mine: dict[int, list[float]] = {}
        for (part, _), batch in zip(share.microbatches, batches, strict=True):
            pieces = batch["ref_logprobs"].split(batch.cu_seqlens.diff().tolist())
            for row, piece in zip(part, pieces, strict=False):
                # Context parallelism pads a sequence at its end.
                mine[row] = piece[: len(sequence(dataset[row])["tokens"])].tolist()
        return gather_rows(mine, self._groups.dp)


def describe_weights(path: str) -> str:
    """Tensors and a short digest of a model directory, of its architecture and of some weights from each tensor.

    Not of all weights: they may be as many as a disk reads in half an hour. Training moves them everywhere.
    """
    reader = HfReader(path)
    names = sorted(reader.names())
    digest = hashlib.sha256(json.dumps(architecture_of(reader.config).in_json(), sort_keys=True).encode())
    for name in names[:: -(-len(names) // _TENSORS)]:
        digest.update(f"{name} {reader.shape(name)}".encode())
        *rows, width = reader.shape(name) or (0,)
        if width and all(rows):
            begin = max(0, width - _WEIGHTS) // 2
            weights = reader.read(name, (*(size // 2 for size in rows), slice(begin, begin + _WEIGHTS)))
            digest.update(weights.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{len(names)} tensors {digest.hexdigest()[:8]}"


def _content(dataset: Dataset) -> str:
    """A digest of all rows: `datasets`' own fingerprint of a list of rows changes from run to run."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _write(path: Path, dataset: Dataset, columns: Mapping[str, list[list[float]]]) -> None:
    """Under a temporary name first: half a directory never has the right one."""
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    dataset.save_to_disk(str(partial))
    partial.rename(path)
