"""Runs documentation's scripts, in a test rank with their import changed or in TRL as they stand.

In TRL, in a process of its own:  python -m tests.examples.script_runs WORKSHOP RESULTS.json NAME...
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import runpy
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file

from megalign.config.rollout import RolloutConfig
from tests.examples.documented import OFFLINE, ONLINE, QUICK_STARTS

SCRIPTS = OFFLINE | QUICK_STARTS | ONLINE


def moved(source: str) -> str:
    """The script with its import changed and nothing else."""
    return source.replace("from trl", "from megalign")


@contextlib.contextmanager
def standing_in(directory: Path, words: Sequence[str] = ()) -> Iterator[None]:
    """As a script that is started in `directory` with these words finds it."""
    here, argv, cache = os.getcwd(), sys.argv, datasets.config.HF_DATASETS_CACHE
    os.chdir(directory)
    sys.argv = ["script.py", *words]
    datasets.config.HF_DATASETS_CACHE = directory / "cache"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.chdir(here)
        sys.argv, datasets.config.HF_DATASETS_CACHE = argv, cache


def directory_of(workshop: Path, name: str) -> Path:
    """A directory of its own for the script's output, with the models and datasets in it."""
    directory = workshop / name.replace(" ", "-")
    directory.mkdir()
    for shared in ("tiny", "data"):
        (directory / shared).symlink_to(workshop / shared)
    return directory


def run_moved(workshop: Path, name: str) -> dict[str, Any]:
    """What the script leaves: its trainer's history, its model, whether the weights are finite and have changed."""
    directory = directory_of(workshop, name)
    script = directory / "script.py"
    script.write_text(moved(textwrap.dedent(SCRIPTS[name])))
    with standing_in(directory):
        trainer = runpy.run_path(str(script), run_name="__main__")["trainer"]
        output = str(Path(trainer.args.output_dir).resolve())
        before, after = (load_file(f"{path}/model.safetensors") for path in (trainer.model_path, output))
    shared = before.keys() & after.keys()
    return {
        "trainer": type(trainer).__module__,
        "steps": trainer.state.global_step,
        "history": trainer.state.log_history,
        "output": output,
        "files": {path.name for path in Path(output).iterdir()},
        "finite": all(bool(tensor.isfinite().all()) for tensor in after.values()),
        "changed": any(not torch.equal(before[key].float(), after[key].float()) for key in shared),
    }


def run_all(workshop: Path, names: Sequence[str]) -> dict[str, Any]:
    """One after another; an error stands in the place of a result."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = run_moved(workshop, name)
        except Exception:  # whatever a script raises is its own test's to tell
            found[name] = traceback.format_exc()
    return found


def run_online(workshop: Path, own: Sequence[str], shared: Sequence[str]) -> dict[str, Any]:
    """The scripts of `own` start vLLM as users' do; then those of `shared` start it once for all of them."""
    from megalign.trainers import online

    found = run_all(workshop, own)
    real, started = online.VllmEngine, {}

    def engine(model_path: str, args: Any, groups: Any) -> Any:
        names = [field.name for field in dataclasses.fields(RolloutConfig) if field.name.startswith("vllm_")]
        options = str([model_path, *(getattr(args, name) for name in (*names, "generation_kwargs", "bf16", "seed"))])
        if options not in started:
            started[options] = real(model_path, args, groups)
        return started[options]

    online.VllmEngine = engine
    try:
        found |= run_all(workshop, shared)
    finally:
        online.VllmEngine = real
    return {**found, "started": len(started)}


# ---- in TRL


def on_trl(workshop: Path, names: Sequence[str]) -> dict[str, Any]:
    """Steps and mean loss of each script as it stands, in fp32: TRL's own default of bf16 needs a GPU."""
    import trl

    for kind in ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO"):
        _default(getattr(trl, f"{kind}Config"), use_cpu=True, bf16=False, report_to=[])
    found = {}
    for name in names:
        directory = directory_of(workshop, name)
        script = directory / "script.py"
        script.write_text(textwrap.dedent(SCRIPTS[name]))
        with standing_in(directory):
            trainer = runpy.run_path(str(script), run_name="__main__")["trainer"]
        last = trainer.state.log_history[-1]
        found[name] = {"steps": trainer.state.global_step, "loss": last["train_loss"]}
    return found


def _default(config: Any, **fields: Any) -> None:
    """Other defaults for fields of the dataclass."""
    original = config.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **given: Any) -> None:
        original(self, *args, **(fields | given))

    config.__init__ = init


if __name__ == "__main__":
    results = on_trl(Path(sys.argv[1]), sys.argv[3:])
    Path(sys.argv[2]).write_text(json.dumps(results))
