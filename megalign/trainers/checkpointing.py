"""Checkpoints: what a run keeps in checkpoint-{step}/ to go on, at the same layout bitwise.

`engine/` and its like are the engines' training checkpoints; `loop/run.pt` is what all ranks know alike,
`loop/replica_*.pt` what a data-parallel replica was to learn from next, `loop/rank_*.pt` a rank's generators.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import struct
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_callback import TrainerState

from megalign import durable
from megalign.checkpoints.checksums import checksum_of
from megalign.checkpoints.find import HUGGING_FACE
from megalign.conversion.hf_files import listing
from megalign.errors import UserError
from megalign.parallel.control import agree, any_rank, from_first, gather_objects
from megalign.parallel.groups import ParallelGroups
from megalign.trainers import manifest
from megalign.trainers.generators import rng_state, set_rng_state
from megalign.trainers.run_file import RUN_FILE, model_of, new_run, read_run, write_run
from megalign.unpickle import DAMAGED, load_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megalign.model.checkpoint import Saving
    from megalign.train_engine import TrainEngine

STATE = "trainer_state.json"
_LOOP = "loop"
# CheckpointException is torch's, of a file that any rank could not read; it is no Exception.
_DAMAGED_ENGINE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, OSError, EOFError),
    *(json.JSONDecodeError, UnicodeDecodeError, CheckpointException, CheckpointingException),
)


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where the loop stands, in tensors and plain values."""

    trainer: TrainerState
    run: Mapping[str, Any]  # the same on every rank
    replica: Any  # of the rank's data-parallel replica


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A LoopState as a checkpoint gives it back: of every replica that there was, whatever the layout is now."""

    trainer: TrainerState
    run: Mapping[str, Any]
    replicas: list[Any]


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """One that this run writes, has written or was resumed from, as this rank knows it."""

    path: Path
    content: Mapping[str, Any]  # of the manifest
    sums: Mapping[str, str]  # checksums of the loop's files that this rank has written, at least


class Checkpoints:
    """Writes and reads the checkpoints of one run; every method is called on all ranks."""

    def __init__(self, args: Any, groups: ParallelGroups, say: Callable[[str], None]) -> None:
        self._args, self._groups, self._say = args, groups, say
        self._run: str | None = None  # its name in run.json and in manifests
        self._saved: _Checkpoint | None = None  # what this run was resumed from or has written last, whole
        self._pending: tuple[_Checkpoint, Mapping[str, Saving]] | None = None  # written while training goes on

    def save(
        self,
        engines: Mapping[str, TrainEngine],
        loop: LoopState,
        settings: Mapping[str, Any],
        *,
        special_tokens: Mapping[str, int],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Writes output_dir/checkpoint-{step}; with async_save it is whole once `progress` has seen its end.

        Not again where this run has written the same there, or was resumed from it: the weights are of the step.
        The models' config files get the tokenizer's `special_tokens`, and `tokenizer` where it is not their own.
        """
        self.progress(wait=True)
        step, world = loop.trainer.global_step, self._groups.world
        path = Path(self._args.output_dir) / f"checkpoint-{step}"
        layout = layout_of(self._args, self._groups)
        content = {"step": step, "run": self._run, "settings": dict(settings), "layout": layout}
        files = self._loop_files(loop)
        sums = {name: checksum_of(data) for name, data in files.items()}
        checkpoint = _Checkpoint(path=path, content=content, sums=sums)
        if not any_rank([not self._is_saved(checkpoint)], world)[0]:
            return
        self._saved = None
        with self._writing(path):
            agree(lambda: self._begin(path), world)
            agree(lambda: _write(path, files), world)
            if self._args.async_save:
                savings = {name: _begun(engine, path / name, special_tokens) for name, engine in engines.items()}
                agree(lambda: self._write_tokenizer(path, engines, tokenizer), world)
                self._pending = checkpoint, savings
            else:
                written = {name: _saved(engine, path / name, special_tokens) for name, engine in engines.items()}
                agree(lambda: self._write_tokenizer(path, engines, tokenizer), world)
                self._declare_whole(checkpoint, written)

    def progress(self, *, wait: bool = False) -> None:
        """Declares the pending checkpoint whole if all of its files are written; `wait`s for them."""
        if self._pending is None:
            return
        (checkpoint, savings), written = self._pending, {}
        with self._writing(checkpoint.path):
            for name, saving in savings.items():
                written[name] = saving.finish(wait=wait)
                if written[name] is None:
                    return
            self._pending = None
            self._declare_whole(checkpoint, written)

    def find(self, resume: str | bool | None) -> Path | None:
        """What resume_from_checkpoint means; None, which is said, where there is nothing to resume from.

        As rank 0 sees it: a node whose listing is older would go on from another step, and nobody would know.
        """
        world, output_dir = self._groups.world, self._args.output_dir
        path, content, others = from_first(lambda: self._found(resume), world)
        if path is None:
            if others:
                self._say(
                    f"{listing(others, 5)} in {output_dir} {'is' if len(others) == 1 else 'are'} of an earlier run: "
                    "training starts afresh, and latest will mean this run's own; "
                    f"resume_from_checkpoint={Path(output_dir) / others[0]} goes on with the earlier one"
                )
            elif resume:
                self._say(f"no checkpoint in {output_dir} yet: training starts afresh")
            return None
        try:
            agree(lambda: manifest.await_manifest(path, content), world)
        except OSError as error:
            raise UserError(f"{error}; resume from a directory that all nodes share") from error
        return path

    def _found(self, resume: str | bool | None) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
        """The checkpoint and its manifest; where there is none, those of earlier runs, the newest first."""
        path = manifest.find_checkpoint(self._args.output_dir, resume)
        if path is not None:
            return path, manifest.read_manifest(path), []
        return None, None, [other.name for other in reversed(manifest.whole_checkpoints(self._args.output_dir))]

    def start_run(self) -> None:
        """A run from its first step: what was saved before is not its own."""
        self._saved = None
        self._run = from_first(new_run, self._groups.world)
        self.note_run()

    def note_run(self) -> None:
        """run.json says which run is under way, and of no model: the one in output_dir is about to change."""
        self._note(lambda: {"run": self._run})

    def note_model(self, step: int) -> None:
        """run.json says that the model in output_dir, which is on the disk by now, is the run's at that step."""

        def content() -> dict[str, Any]:
            for file in filter(Path.is_file, Path(self._args.output_dir).iterdir()):
                durable.sync(file)  # a tokenizer's are written by transformers
            saved = self._saved
            if saved is None or saved.content["step"] != step or not (saved.path / manifest.MANIFEST).exists():
                return {"run": self._run, "model": {"step": step}}
            return {"run": self._run, "model": model_of(saved.path, step)}

        self._note(content)

    def _note(self, content: Callable[[], dict[str, Any]]) -> None:
        world, output_dir = self._groups.world, self._args.output_dir

        def write() -> None:
            if world.rank == 0:
                write_run(output_dir, content())

        try:
            agree(write, world)
        except OSError as error:
            raise UserError(
                f"{Path(output_dir) / RUN_FILE} cannot be written ({error.strerror}); make room or choose another "
                "output_dir"
            ) from error

    def has_model(self, directories: Iterable[Path]) -> bool:
        """Whether the model of the checkpoint that was resumed from was written to output_dir, and is still there."""
        saved = self._saved
        assert saved is not None, "asked after a resume"

        def is_there() -> bool:
            noted = read_run(self._args.output_dir).get("model")
            whole = all((directory / "config.json").exists() for directory in directories)
            return whole and noted == model_of(saved.path, saved.content["step"])

        return from_first(is_there, self._groups.world)

    def load(
        self,
        path: Path,
        engines: Mapping[str, TrainEngine],
        settings: Mapping[str, Any],
        hints: Mapping[str, str] | None = None,
    ) -> Resumed:
        """Puts the engines and this rank's generators where the checkpoint left them; the loop's state.

        `hints` say more of settings that are not what they were.
        """
        manifest.check_settings(path, settings, hints or {})
        manifest.check_files(path, self._groups.world)
        for name, engine in engines.items():
            with engine.kept_as_it_was(), _reading(path / name, *_DAMAGED_ENGINE):
                engine.load(str(path / name))
        ranks, replicas = (manifest.files_like(path, f"{_LOOP}/{of}_*.pt") for of in ("rank", "replica"))
        # A rank that there was not begins as one that there was.
        set_rng_state(_load(ranks[self._groups.world.rank % len(ranks)]))
        with _reading(path / STATE, ValueError, TypeError):  # no JSON, or other fields
            trainer = TrainerState.load_from_json(str(path / STATE))
        self._say(f"resumed from {path}{self._change_of_layout(path)}")
        content = manifest.manifest_of(path)
        sums = {name: then["xxh3_128"] for name, then in content["files"].items()}
        self._saved = _Checkpoint(path=path, content=content, sums=sums)
        self._run = content.get("run")
        run = _load(path / _LOOP / "run.pt")
        return Resumed(trainer=trainer, run=run, replicas=[_load(file) for file in replicas])

    def _is_saved(self, wanted: _Checkpoint) -> bool:
        saved = self._saved
        return (
            saved is not None
            and (saved.path, saved.content["layout"]) == (wanted.path, wanted.content["layout"])
            and wanted.sums.items() <= saved.sums.items()
        )

    def _begin(self, path: Path) -> None:
        """On rank 0 alone, so that no other makes a directory in one that is being removed."""
        if self._groups.world.rank == 0:
            manifest.make_room(path)
            (path / _LOOP).mkdir(parents=True)

    def _loop_files(self, loop: LoopState) -> dict[str, bytes]:
        """Those that this rank writes, by name."""
        groups = self._groups
        files = {f"{_LOOP}/rank_{groups.world.rank:05d}.pt": _dumped(rng_state())}
        if groups.is_dp_leader:
            files[f"{_LOOP}/replica_{groups.dp.rank:05d}.pt"] = _dumped(loop.replica)
        if groups.world.rank == 0:
            files[f"{_LOOP}/run.pt"] = _dumped(dict(loop.run))
            state = json.dumps(dataclasses.asdict(loop.trainer), indent=2, sort_keys=True)  # as its save_to_json
            files[STATE] = f"{state}\n".encode()
        return files

    def _write_tokenizer(self, path: Path, names: Iterable[str], tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None and self._groups.world.rank == 0:
            for name in names:
                tokenizer.save_pretrained(path / name / HUGGING_FACE)

    def _declare_whole(self, checkpoint: _Checkpoint, written: Mapping[str, Mapping[str, str]]) -> None:
        """The manifest, from the checksums of the files that each rank wrote, `written` for engines; then rotation."""
        world = self._groups.world
        mine = {f"{name}/{file}": value for name, files in written.items() for file, value in files.items()}
        mine |= checkpoint.sums
        checksums = {name: value for part in gather_objects(mine, world) for name, value in part.items()}

        def declare() -> None:
            if world.rank == 0:
                manifest.write_manifest(checkpoint.path, checkpoint.content, checksums)
                manifest.rotate_checkpoints(self._args.output_dir, self._args.save_total_limit, checkpoint.path)

        agree(declare, world)
        self._saved = checkpoint

    def _change_of_layout(self, path: Path) -> str:
        now, then = layout_of(self._args, self._groups), manifest.manifest_of(path)["layout"]
        changed = [f"{name} {before} -> {value}" for name, value, before in manifest.differences(now, then)]
        return f" of another layout ({', '.join(changed)}): the same training within rounding" if changed else ""

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turns a full disk, a file in the directory's place and the like into a UserError."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]  # CheckpointException tells of all ranks, with tracebacks
            raise UserError(
                f"cannot write the checkpoint {path} ({reason}); make room or choose another output_dir"
            ) from error


def layout_of(args: Any, groups: ParallelGroups) -> dict[str, Any]:
    """How the model is split, for whoever reads the manifest."""
    axes = {"tp": groups.tp, "cp": groups.cp, "pp": groups.pp, "dp": groups.dp, "ep": groups.ep, "etp": groups.etp}
    return {
        **{name: axis.size for name, axis in axes.items()},
        "vpp": args.num_chunks,
        "sequence_parallel": args.sequence_parallel,
        "num_layers_in_first_pipeline_stage": args.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": args.num_layers_in_last_pipeline_stage,
    }


def _dumped(value: Any) -> bytes:
    """torch.save, whose own writer answers a full disk with a RuntimeError of its archive."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        durable.write(path / name, data)


def _saved(engine: TrainEngine, path: Path, special_tokens: Mapping[str, int]) -> dict[str, str]:
    with engine.kept_as_it_was():
        return engine.save(str(path), special_tokens=special_tokens)


def _begun(engine: TrainEngine, path: Path, special_tokens: Mapping[str, int]) -> Saving:
    with engine.kept_as_it_was():
        return engine.begin_save(str(path), special_tokens=special_tokens)


def _load(file: Path) -> Any:
    with _reading(file, *DAMAGED), file.open("rb") as stream:
        return load_data(stream, str(file), map_location="cpu")


@contextmanager
def _reading(path: Path, *damage: type[BaseException]) -> Iterator[None]:
    """Turns what a damaged file raises into a UserError."""
    try:
        yield
    except damage as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
        checkpoint = path.parent if path.parent.name != _LOOP else path.parent.parent
        raise UserError(f"{path} is damaged ({reason}); {manifest.other_than(checkpoint)}") from error
