"""SFT as users start it: torchrun, two agents, srun, one process; whole, continued, finished."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megalign.launch import hold_port
from tests.jobs.inputs import save_model, sums, write_rows, write_yaml
from tests.jobs.start import megalign, run, run_together, torchrun
from tests.tiny import load_reference
from tests.trainers.runs import digest, metric_lines

pytestmark = pytest.mark.slow
STEPS = 4
FIELDS = {
    "dataset_name": "rows.jsonl",
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-2",
    "logging_steps": 1,
    "save_steps": 2,
    "disable_tqdm": True,
    "env": {"MEGALIGN_TEST_JOB": "1"},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the user's own, with everything that run.yaml names."""
    path = tmp_path_factory.mktemp("somewhere")
    save_model(path / "model")
    write_rows(path / "rows.jsonl", sums(20))
    write_yaml(path / "run.yaml", model_name_or_path="model", output_dir="out", **FIELDS)
    return path


@pytest.fixture(scope="module")
def whole(here: Path) -> Path:
    """The output of two ranks under torchrun, data parallel: half the batch each."""
    words = ["--per-device-train-batch-size", "2", "--output_dir=two ranks", "--resume_from_checkpoint", "latest"]
    ended = run(torchrun(2, "-m", "megalign", "sft", "--config", "run.yaml", *words), here).succeeded()
    assert "megalign: no checkpoint in two ranks yet: training starts afresh" in ended.stdout
    assert "Warning" not in ended.stderr
    return here / "two ranks"


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in metric_lines(path)]


def test_a_job_leaves_metrics_checkpoints_and_the_model(here: Path, whole: Path) -> None:
    lines = metric_lines(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "mean_token_accuracy"} <= lines[0].keys()
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (whole / "checkpoint-2" / "manifest.json").is_file() and (whole / "checkpoint-4" / "manifest.json").is_file()
    before, after = load_file(here / "model" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    load_reference(str(whole))
    assert (whole / "tokenizer.json").read_bytes() == (here / "model" / "tokenizer.json").read_bytes()


def test_one_process_without_a_launcher_gives_the_same_losses(here: Path, whole: Path) -> None:
    run(megalign("sft", "--config", "run.yaml", "--save_strategy", "no"), here).succeeded()
    assert losses(here / "out") == pytest.approx(losses(whole), abs=1e-4)
    assert not list((here / "out").glob("checkpoint-*"))


def test_two_agents_give_one_agents_losses(here: Path, whole: Path) -> None:
    words = ["--config", "run.yaml", "--per_device_train_batch_size", "2", "--output_dir", "two nodes"]
    agent = torchrun(1, "-m", "megalign", "sft", *words, "--save_strategy", "no", nodes=2)
    first, second = run_together([agent, agent], here)
    first.succeeded()
    second.succeeded()
    assert losses(here / "two nodes") == pytest.approx(losses(whole), abs=1e-6)


def test_srun_resumes_the_latest_whole_checkpoint_to_the_same_end(here: Path, whole: Path) -> None:
    path = here / "resumed"
    shutil.copytree(whole, path)
    (path / "checkpoint-4" / "manifest.json").unlink()  # killed while it was writing
    (path / "model.safetensors").unlink()
    words = ["--config", here / "run.yaml", "--per_device_train_batch_size", "2", "--output_dir", path]
    command = megalign("sft", *words, "--resume_from_checkpoint", "latest")
    with hold_port() as held:
        environs = [slurm_task(rank, held.getsockname()[1]) for rank in range(2)]
        first, second = run_together([command, command], here, environs)
    first.succeeded()
    second.succeeded()
    assert f"megalign: resumed from {path / 'checkpoint-2'}" in first.stdout
    assert [line["step"] for line in metric_lines(path)] == [1, 2, 3, 4]
    assert losses(path) == losses(whole)
    assert digest(path) == digest(whole)


def slurm_task(rank: int, port: int) -> dict[str, str]:
    """What srun sets for a task of a step of two; the job's number makes the port, which must be free here."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "MASTER_PORT": str(port),
    }


def test_a_finished_run_is_left_as_it_is(here: Path, whole: Path) -> None:
    before: dict[str, Any] = {str(path): path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    words = ["--per_device_train_batch_size", "2", "--output_dir", whole, "--resume_from_checkpoint", "latest"]
    ended = run(torchrun(2, "-m", "megalign", "sft", "--config", "run.yaml", *words), here).succeeded()
    assert "megalign: the run is finished" in ended.stdout
    assert {str(path): path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
