"""The reference model: its logprobs computed once and kept, and a reference that follows the policy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.config import DPOConfig
from megalign.errors import UserError
from megalign.trainers.reference import describe_weights
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model
from tests.trainers.layout_runs import pair_rows
from tests.trainers.runs import StopAt, digest, metric_lines

ROWS = pair_rows(8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A policy and a reference that differs from it."""
    return tuple(save_tiny_model("llama", tmp_path_factory.mktemp(f"model{seed}"), seed=seed) for seed in (0, 1))


def train(paths: tuple[str, str], fields: dict[str, Any], given: dict[str, Any] | None = None) -> dict[str, Any]:
    from megalign.trainers.dpo import DPOTrainer

    given = dict(given or {})
    resume, rows = given.pop("resume", None), given.pop("rows", ROWS)
    fields = {
        "bf16": False, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "shuffle_dataset": False,
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, **fields,
    }  # fmt: skip
    trainer = DPOTrainer(paths[0], paths[1], DPOConfig(**fields), train_dataset=rows, **given)
    forwards: list[int] = []
    if not fields.get("precompute_ref_log_probs"):
        original = trainer.reference.engine.forward
        trainer.reference.engine.forward = lambda *a, **k: forwards.append(1) or original(*a, **k)
    trainer.train(resume_from_checkpoint=resume)
    engine = type(trainer.reference._engine).__name__
    return {"digest": digest(fields["output_dir"]), "forwards": len(forwards), "engine": engine}


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in metric_lines(directory)]


def cached(directory: Path) -> list[Path]:
    return sorted((directory / "reference_logprobs").iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_precomputed_logprobs_give_the_same_run(world: int, paths: tuple[str, str], tmp_path: Path) -> None:
    layout = {"pipeline_model_parallel_size": world}
    (plain, *_) = run_ranks(world, train, paths, {"output_dir": str(tmp_path / "plain"), **layout})
    once = {"output_dir": str(tmp_path / "once"), "precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    (found, *_) = run_ranks(world, train, paths, {**once, **layout})
    assert plain["forwards"] == 2
    assert found["engine"] == "NoneType"  # its memory is free
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    assert losses(tmp_path / "plain")[0] != pytest.approx(0.6931, abs=1e-3)


def test_they_are_computed_again_only_when_something_changed(paths: tuple[str, str], tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "precompute_ref_log_probs": True}
    run_ranks(1, train, paths, fields)
    (first,) = cached(tmp_path)
    stamp = first.stat().st_mtime_ns
    run_ranks(1, train, paths, fields)
    assert cached(tmp_path) == [first] and first.stat().st_mtime_ns == stamp
    run_ranks(1, train, paths, fields, {"rows": [*ROWS[:-1], pair_rows(1, seed=9)[0]]})  # another row
    assert len(cached(tmp_path)) == 2
    run_ranks(1, train, paths, {**fields, "bf16": True})  # other arithmetic
    assert len(cached(tmp_path)) == 3
    weights = Path(paths[1]) / "model.safetensors"
    os.utime(weights, (weights.stat().st_atime, weights.stat().st_mtime + 5))  # written anew
    run_ranks(1, train, paths, fields)
    assert len(cached(tmp_path)) == 4


def test_a_moving_reference_is_part_of_a_resumed_run(paths: tuple[str, str], tmp_path: Path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3, "max_steps": 5}
    moving |= {"save_strategy": "steps", "save_steps": 3}
    whole, parts = ({"output_dir": str(tmp_path / name), **moving} for name in ("whole", "parts"))
    (expected,) = run_ranks(1, train, paths, whole)
    run_ranks(1, train, paths, parts, {"callbacks": [StopAt(3)]})
    (found,) = run_ranks(1, train, paths, parts, {"resume": "latest"})
    assert found["digest"] == expected["digest"]
    (fixed,) = run_ranks(1, train, paths, {"output_dir": str(tmp_path / "fixed"), "max_steps": 5})
    assert fixed["digest"] != expected["digest"]


def refused(paths: tuple[str, str], fields: dict[str, Any], given: dict[str, Any] | None = None) -> str:
    try:
        train(paths, fields, given)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("tp", [1, 2])
def test_a_reference_that_cannot_be_compared_is_refused(paths: tuple[str, str], tmp_path: Path, tp: int) -> None:
    small = save_tiny_model("llama", tmp_path / "small", vocab_size=40)
    fields = {"output_dir": str(tmp_path / "out"), "tensor_model_parallel_size": tp}
    for error in run_ranks(tp, refused, (paths[0], small), fields, fresh=True):
        assert "is not in the vocabulary of" in error and "which has 40 entries" in error
    for error in run_ranks(tp, refused, (paths[0], small), {**fields, "sync_ref_model": True}):
        assert "sync_ref_model=True" in error and "another architecture" in error


def test_a_run_goes_on_with_the_same_reference_elsewhere_and_with_no_other(
    paths: tuple[str, str], tmp_path: Path
) -> None:
    fields = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 2}
    fields["precompute_ref_log_probs"] = True
    run_ranks(1, train, paths, fields)
    longer, checkpoint = {**fields, "max_steps": 3}, str(tmp_path / "out/checkpoint-2")
    (error,) = run_ranks(1, refused, (paths[0], paths[0]), longer, {"resume": checkpoint})
    now, then = (describe_weights(path) for path in paths)
    assert f"ref_model is {now} but {checkpoint} was made with {then}" in error
    moved = str(shutil.copytree(paths[1], tmp_path / "under another name"))
    # Another split into batches computes other logprobs, in their last bits.
    longer |= {"output_dir": str(tmp_path / "on"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert run_ranks(1, refused, (paths[0], moved), longer, {"resume": checkpoint}) == [""]
    assert [line["step"] for line in metric_lines(tmp_path / "on")] == [3]


def test_a_model_is_known_by_its_weights_wherever_they_lie(paths: tuple[str, str], tmp_path: Path) -> None:
    described, (model, config) = (
        describe_weights(paths[0]),
        (tmp_path / name for name in ("model.safetensors", "config.json")),
    )
    weights = load_file(Path(paths[0]) / "model.safetensors")
    config.write_bytes((Path(paths[0]) / "config.json").read_bytes())
    names = sorted(weights)
    index = {"weight_map": {name: f"{place % 2}.safetensors" for place, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for part in range(2):  # the same weights in two files
        save_file({name: weights[name] for name in names[part::2]}, tmp_path / f"{part}.safetensors")
    assert describe_weights(str(tmp_path)) == described
    for name in names:
        save_file({**weights, name: weights[name] + 1}, model)
        assert describe_weights(str(tmp_path)) != described, name
    save_file(weights, model)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert describe_weights(str(tmp_path)) != described


def test_the_reference_is_not_written_over(paths: tuple[str, str]) -> None:
    (error,) = run_ranks(1, refused, paths, {"output_dir": paths[1]})
    assert "is also the directory of ref_model, which the trained model would overwrite" in error


def followed(paths: tuple[str, str], directory: str) -> None:
    from megalign.trainers.dpo import DPOTrainer

    args = DPOConfig(
        output_dir=directory, bf16=False, max_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.3, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = DPOTrainer(paths[0], paths[1], args, train_dataset=ROWS)
    trainer.train()
    trainer.reference.engine.export(f"{directory}/reference")


def test_the_reference_moves_by_alpha_towards_the_updated_policy(paths: tuple[str, str], tmp_path: Path) -> None:
    run_ranks(1, followed, paths, str(tmp_path))
    before, policy, after = (
        load_file(Path(directory) / "model.safetensors") for directory in (paths[1], tmp_path, tmp_path / "reference")
    )
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, 0.7 * before[name] + 0.3 * policy[name], rtol=1e-6, atol=1e-7)
