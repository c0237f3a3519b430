"""A run that is resumed, or made longer, is bit by bit the one that was never interrupted."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset

from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.trainers import generators
from megalign.trainers.sft import SFTTrainer
from tests.ranks import run_ranks
from tests.trainers.resume_runs import ROWS, saving_fields
from tests.trainers.runs import StopAt, metric_lines, sft_fields, train_sft, without_times

LAYOUTS = {
    1: {},
    2: {"pipeline_model_parallel_size": 2},
    4: {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True, "gradient_accumulation_steps": 1},
}


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    world: int, in_background: bool, model: str, tmp_path: Path
) -> None:
    whole = saving_fields(tmp_path / "whole", **LAYOUTS[world])
    parts = saving_fields(tmp_path / "parts", **LAYOUTS[world], async_save=in_background)
    expected = run_ranks(world, train_sft, model, ROWS, whole)[0]
    first = run_ranks(world, train_sft, model, ROWS, parts, {"stop": StopAt(3)})[0]
    assert first["output"].global_step == 3
    second = run_ranks(world, train_sft, model, ROWS, parts, {"resume": "latest"})[0]
    assert second["digest"] == expected["digest"] != first["digest"]
    lines = [without_times(line) for line in metric_lines(tmp_path / "parts")]
    assert lines == [without_times(line) for line in metric_lines(tmp_path / "whole")]
    assert [line["step"] for line in lines] == [2, 4, 6]


@pytest.mark.parametrize(("killed_after", "missed"), [(4, 0), (8, 2)])
def test_a_run_killed_at_an_epochs_last_step_still_ends_the_epoch(
    killed_after: int, missed: int, model: str, tmp_path: Path
) -> None:
    by_epoch = {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 4, "max_steps": 8}
    by_epoch["eval_on_start"] = True  # at the run's start, not at a resumed one's
    given = {"eval_dataset": ROWS[:3]}
    run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path / "whole", **by_epoch), given)
    expected = [without_times(line) for line in metric_lines(tmp_path / "whole")]
    steps = [(line["step"], "loss" in line) for line in expected]
    assert steps == [(0, False), (4, True), (4, False), (8, True), (8, False)]
    checkpoint = f"checkpoint-{killed_after}"  # written at the step, before the epoch's end
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "parts" / checkpoint)
    parts = saving_fields(tmp_path / "parts", **by_epoch)
    run_ranks(1, train_sft, model, ROWS, parts, {**given, "resume": "latest"})
    assert [without_times(line) for line in metric_lines(tmp_path / "parts")] == expected[1 + missed :]


def test_lines_of_repeated_steps_take_the_place_of_the_first(model: str, tmp_path: Path) -> None:
    fields = saving_fields(tmp_path, logging_steps=1)
    run_ranks(1, train_sft, model, ROWS, fields, {"stop": StopAt(5)})
    before = metric_lines(tmp_path)
    run_ranks(1, train_sft, model, ROWS, fields, {"resume": True})
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [without_times(line) for line in lines[:5]] == [without_times(line) for line in before]


def test_a_run_that_ended_within_an_epoch_can_be_made_longer(model: str, tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant", "save_strategy": "epoch", "logging_steps": 1}
    (whole,) = run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path / "whole", **constant))
    run_ranks(1, train_sft, model, ROWS, saving_fields(tmp_path / "parts", **constant, max_steps=3))  # of 4 in an epoch
    (longer,) = run_ranks(
        1, train_sft, model, ROWS, saving_fields(tmp_path / "parts", **constant), {"resume": "latest"}
    )
    assert longer["output"].global_step == 6
    assert longer["digest"] == whole["digest"]
    assert [line["step"] for line in metric_lines(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_a_run_on_a_stream_in_its_order_can_be_made_longer(model: str, tmp_path: Path) -> None:
    def fields(directory: str, steps: int, **more: Any) -> dict[str, Any]:
        constant = {"lr_scheduler_type": "constant", "save_strategy": "epoch", "shuffle_dataset": False}
        return saving_fields(tmp_path / directory, **constant, max_steps=steps, logging_steps=1, **more)

    (whole,) = run_ranks(1, _train_on_stream, model, ROWS, fields("whole", 3))
    run_ranks(1, _train_on_stream, model, ROWS, fields("parts", 2))  # its rows are an epoch
    parts = fields("parts", 3)
    other = [*ROWS[:3], ROWS[0], *ROWS[4:]]
    (error,) = run_ranks(1, _train_on_stream, model, other, parts)
    assert re.search("train_dataset is 8 rows .* was made with 8 rows .*without it max_steps may grow", error), error
    (error,) = run_ranks(1, _train_on_stream, model, ROWS, {**parts, "shuffle_dataset": True})
    assert re.search("shuffle_dataset is True but .* was made with False", error), error
    (longer,) = run_ranks(1, _train_on_stream, model, ROWS, parts)
    assert longer == whole
    assert [line["step"] for line in metric_lines(tmp_path / "parts")] == [1, 2, 3]


def _train_on_stream(path: str, rows: list[dict[str, Any]], fields: dict[str, Any]) -> str:
    try:
        return train_sft(path, IterableDataset.from_generator(lambda: iter(rows)), fields, {"resume": "latest"})[
            "digest"
        ]
    except UserError as error:
        return str(error)


def _adam_of_a_resumed_run(path: str, fields: dict[str, Any]) -> list[tuple[Any, ...]]:
    trainer = SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS)
    trainer.train("latest")
    groups = trainer.policy._optimizer.param_groups
    return [(group["betas"], group["eps"], group["weight_decay"] > 0) for group in groups]


def test_a_resumed_runs_adam_is_its_own(model: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-3")
    changed = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.125, "weight_decay": 0.1, "max_steps": 4}
    (groups,) = run_ranks(1, _adam_of_a_resumed_run, model, saving_fields(tmp_path, **changed))
    assert [group[:2] for group in groups] == [((0.5, 0.75), 0.125)] * len(groups)
    assert any(decays for *_, decays in groups)


def test_generators_come_back_where_they_were(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.standard_normal()  # leaves a cached second normal
    random.gauss(0, 1)
    torch.save(generators.rng_state(), tmp_path / "rng.pt")

    def draw() -> tuple[Any, ...]:
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        )

    expected = draw()
    draw()
    generators.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected
