"""Checkpoints: whole or not there, rotated, and resumed from bit by bit."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from datasets import IterableDataset
from transformers import TrainerCallback

from megalign.checkpoints.inspect import summary_of
from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.trainers import generators, manifest
from megalign.trainers.manifest import checkpoints, find_checkpoint
from megalign.trainers.sft import SFTTrainer
from tests.megatron_version import wanted_version
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model
from tests.trainers.runs import StopAt, digest, metric_lines, sft_fields, token_rows, train_sft, without_times

ROWS = token_rows(14)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def _fields(directory: Path, **fields: Any) -> dict[str, Any]:
    # Every window of 2 steps straddles a checkpoint, and the run has a second epoch in another order.
    return {
        "output_dir": str(directory),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "shuffle_dataset": True,
        "gradient_accumulation_steps": 2,
        **fields,
    }


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
    whole = _fields(tmp_path / "whole", **LAYOUTS[world])
    parts = _fields(tmp_path / "parts", **LAYOUTS[world], async_save=in_background)
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
    run_ranks(1, train_sft, model, ROWS, _fields(tmp_path / "whole", **by_epoch), given)
    expected = [without_times(line) for line in metric_lines(tmp_path / "whole")]
    steps = [(line["step"], "loss" in line) for line in expected]
    assert steps == [(0, False), (4, True), (4, False), (8, True), (8, False)]
    checkpoint = f"checkpoint-{killed_after}"  # written at the step, before the epoch's end
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "parts" / checkpoint)
    parts = _fields(tmp_path / "parts", **by_epoch)
    run_ranks(1, train_sft, model, ROWS, parts, {**given, "resume": "latest"})
    assert [without_times(line) for line in metric_lines(tmp_path / "parts")] == expected[1 + missed :]


def test_lines_of_repeated_steps_take_the_place_of_the_first(model: str, tmp_path: Path) -> None:
    fields = _fields(tmp_path, logging_steps=1)
    run_ranks(1, train_sft, model, ROWS, fields, {"stop": StopAt(5)})
    before = metric_lines(tmp_path)
    run_ranks(1, train_sft, model, ROWS, fields, {"resume": True})
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [without_times(line) for line in lines[:5]] == [without_times(line) for line in before]


def test_a_finished_run_is_not_trained_again(model: str, tmp_path: Path) -> None:
    fields = _fields(tmp_path)
    (first,) = run_ranks(1, train_sft, model, ROWS, fields)
    (second,) = run_ranks(1, train_sft, model, ROWS, fields, {"resume": "latest"})
    assert second["output"].global_step == 6
    assert second["events"] == ["on_init_end"]
    assert "the run is finished" in second["said"]
    (tmp_path / "config.json").unlink()  # killed between the last checkpoint and the model
    run_ranks(1, train_sft, model, ROWS, fields, {"resume": "latest"})
    assert (tmp_path / "config.json").exists()
    assert second["digest"] == first["digest"]


class _Dies(TrainerCallback):
    """At the end of a step or of the training, before anything is written; stands for kill -9."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the step, if one is given."""
        if state.global_step == self.step:
            raise UserError("killed")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end."""
        raise UserError("killed")


def _killed(path: str, fields: dict[str, Any], given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="killed"):
        train_sft(path, ROWS, fields, given)


def test_a_model_of_an_earlier_step_is_not_taken_for_the_finished_runs(model: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)  # with the model of step 3
    before = json.loads((tmp_path / "run.json").read_text())
    run_ranks(1, _killed, model, _fields(tmp_path), {"resume": "latest", "stop": _Dies()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"run": before["run"]}
    assert digest(tmp_path) == digest(made)
    (found,) = run_ranks(1, train_sft, model, ROWS, _fields(tmp_path), {"resume": "latest"})
    assert "does not have the model of that step: it is written now" in found["said"]
    (written,) = run_ranks(1, train_sft, model, ROWS, _fields(tmp_path / "to"), {"resume": f"{tmp_path}/checkpoint-6"})
    assert found["digest"] == written["digest"] != digest(made)
    after = json.loads((tmp_path / "run.json").read_text())
    assert (after["run"], after["model"]["step"], before["model"]["step"]) == (before["run"], 6, 3)


def test_a_run_that_died_before_it_saved_does_not_go_on_from_another_runs_checkpoint(
    model: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    fields = _fields(tmp_path, logging_steps=1, max_steps=2, save_steps=2)
    run_ranks(1, _killed, model, fields, {"stop": _Dies(1)})
    assert find_checkpoint(str(tmp_path), "latest") is None
    (found,) = run_ranks(1, train_sft, model, ROWS, fields, {"resume": "latest"})
    told = f"checkpoint-3 in {tmp_path} is of an earlier run: training starts afresh"
    assert told in found["said"] and f"resume_from_checkpoint={tmp_path}/checkpoint-3 goes on" in found["said"]
    assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2]
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-2"


def test_a_run_on_a_stream_in_its_order_can_be_made_longer(model: str, tmp_path: Path) -> None:
    def fields(directory: str, steps: int, **more: Any) -> dict[str, Any]:
        constant = {"lr_scheduler_type": "constant", "save_strategy": "epoch", "shuffle_dataset": False}
        return _fields(tmp_path / directory, **constant, max_steps=steps, logging_steps=1, **more)

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


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(model: str, tmp_path: Path) -> None:
    (result,) = run_ranks(1, train_sft, model, ROWS, _fields(tmp_path), {"resume": "latest"})
    assert result["output"].global_step == 6
    assert f"no checkpoint in {tmp_path} yet" in result["said"]


def test_one_ranks_wish_to_stop_stops_all(model: str, tmp_path: Path) -> None:
    fields = _fields(tmp_path, save_strategy="no", tensor_model_parallel_size=2)
    results = run_ranks(2, train_sft, model, ROWS, fields, {"stop": StopAt(2, only_rank=1)})
    assert [result["output"].global_step for result in results] == [2, 2]


class _ChangesItsMind(TrainerCallback):
    """On the first rank only, each event of step 2 asks for what comes after it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Evaluate."""
        control.should_evaluate |= self._here(args, state) and "loss" in logs

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save."""
        control.should_save |= self._here(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        control.should_training_stop |= self._here(args, state)

    @staticmethod
    def _here(args: Any, state: Any) -> bool:
        return args.process_index == 0 and state.global_step == 2


def test_what_one_rank_decides_between_two_collectives_all_ranks_do(model: str, tmp_path: Path) -> None:
    fields = _fields(tmp_path, save_strategy="no", tensor_model_parallel_size=2)
    given = {"stop": _ChangesItsMind(), "eval_dataset": ROWS[:3]}
    results = run_ranks(2, train_sft, model, ROWS, fields, given, timeout=60)
    assert [result["output"].global_step for result in results] == [2, 2]
    assert [line["step"] for line in metric_lines(tmp_path) if "eval_loss" in line] == [2]
    assert (tmp_path / "checkpoint-2" / "manifest.json").exists()


def test_only_the_newest_checkpoints_are_kept(model: str, tmp_path: Path) -> None:
    run_ranks(1, train_sft, model, ROWS, _fields(tmp_path, save_steps=1, save_total_limit=2))
    assert [path.name for path in checkpoints(str(tmp_path))] == ["checkpoint-5", "checkpoint-6"]


def test_a_run_that_ended_within_an_epoch_can_be_made_longer(model: str, tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant", "save_strategy": "epoch", "logging_steps": 1}
    (whole,) = run_ranks(1, train_sft, model, ROWS, _fields(tmp_path / "whole", **constant))
    run_ranks(1, train_sft, model, ROWS, _fields(tmp_path / "parts", **constant, max_steps=3))  # of 4 in an epoch
    (longer,) = run_ranks(1, train_sft, model, ROWS, _fields(tmp_path / "parts", **constant), {"resume": "latest"})
    assert longer["output"].global_step == 6
    assert longer["digest"] == whole["digest"]
    assert [line["step"] for line in metric_lines(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_an_earlier_longer_run_in_the_directory_is_not_the_latest(model: str, tmp_path: Path) -> None:
    run_ranks(1, train_sft, model, ROWS, _fields(tmp_path, max_steps=6, save_steps=6))
    run_ranks(1, train_sft, model, ROWS, _fields(tmp_path, max_steps=3, save_steps=1, save_total_limit=2))
    assert [path.name for path in checkpoints(str(tmp_path))] == ["checkpoint-2", "checkpoint-3"]
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-3"


def test_a_checkpoint_without_manifest_is_not_the_latest(model: str, tmp_path: Path) -> None:
    run_ranks(1, train_sft, model, ROWS, _fields(tmp_path, save_steps=2))
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-4"
    with pytest.raises(UserError, match="checkpoint-6 has no manifest.json"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-6"))


def test_the_manifest_lists_every_file_with_its_checksum(model: str, tmp_path: Path) -> None:
    run_ranks(2, train_sft, model, ROWS, _fields(tmp_path, tensor_model_parallel_size=2))
    path = tmp_path / "checkpoint-3"
    content = json.loads((path / "manifest.json").read_text())
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    files.pop("manifest.json")
    assert content["files"] == {
        name: {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)} for name, data in files.items()
    }
    assert {"trainer_state.json", "loop/run.pt", "loop/replica_00000.pt", "loop/rank_00001.pt"} <= files.keys()
    assert content["layout"]["tp"] == 2
    assert summary_of(path).layout == {"tp": 2, "etp": 2}


def _resume_error(path: str, fields: dict[str, Any], rows: list[dict[str, Any]] = ROWS) -> str:
    try:
        SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=rows).train("latest")
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps x data-parallel ranks is 2 but .* with 4"),
        ({"seed": 7}, "seed is 7 but .* was made with 42"),
        ({"max_length": 8}, "max_length is 8 but .* was made with 1024"),
        ({"completion_only_loss": False}, "train_dataset is 14 rows .* but .* was made with 14 rows"),
        ({"bf16": True}, "params_dtype_name is bfloat16 but .* was made with float32"),
    ],
)
def test_other_data_or_steps_are_named(model: str, made: Path, changed: dict[str, Any], message: str) -> None:
    (error,) = run_ranks(1, _resume_error, model, _fields(made, **changed))
    assert re.search(message, error), error


def test_another_row_in_the_middle_is_noticed(model: str, made: Path) -> None:
    rows = [*ROWS[:6], ROWS[7], *ROWS[7:]]
    (error,) = run_ranks(1, _resume_error, model, _fields(made), rows)
    assert re.search("train_dataset is 14 rows .* but .* was made with 14 rows", error), error


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 64}, "model.hidden_size is 64 but .* was made with 32"),
        ({"rms_norm_eps": 1e-3}, "model.norm_epsilon is 0.001 but .* was made with 1e-06"),
    ],
)
def test_another_model_is_named(changed: dict[str, Any], message: str, made: Path, tmp_path: Path) -> None:
    (error,) = run_ranks(1, _resume_error, save_tiny_model("llama", tmp_path, **changed), _fields(made))
    assert re.search(message, error), error


ENGINE_FILES = ["engine/.metadata", "engine/__0_0.distcp", "engine/metadata.json"]
if wanted_version().startswith("0.16."):  # a newer Megatron-Core writes what was in it into the others
    ENGINE_FILES.append("engine/common.pt")


LOOP_FILES = ["loop/run.pt", "loop/replica_00000.pt", "loop/rank_00000.pt", "trainer_state.json"]


def _flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("file", [*ENGINE_FILES, *LOOP_FILES])
def test_a_damaged_file_is_named_and_an_older_checkpoint_offered(
    file: str, model: str, made: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-2")
    damaged = shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-3") / file
    _renew(older, written=0.0)
    content = damaged.read_bytes()
    before = _all_bytes(tmp_path)
    for changed, fault in [
        (content[:-1], f"has {len(content) - 1} bytes where its manifest says {len(content)}"),
        (_flip_a_bit(content), "is damaged: its checksum is not the one in its manifest"),
    ]:
        damaged.write_bytes(changed)
        (error,) = run_ranks(1, _resume_error, model, _fields(tmp_path))
        assert error == f"{damaged} {fault}; resume_from_checkpoint={older} is the newest whole one beside it"
    damaged.write_bytes(content)
    assert _all_bytes(tmp_path) == before, "a refused checkpoint is left as it is"


NO_TEXT, HALF_A_NUMBER = b"\x80", b"\x80\x02M"  # JSON is text; a pickle


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *((file, None) for file in [*ENGINE_FILES, *LOOP_FILES]),
        ("engine/metadata.json", NO_TEXT),
        ("loop/run.pt", HALF_A_NUMBER),
    ],
)
def test_a_file_that_was_damaged_before_it_was_summed_up_is_named(
    file: str, content: bytes | None, model: str, made: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-3")
    named = checkpoint / "engine" if file.startswith("engine") else checkpoint / file
    (checkpoint / file).write_bytes(bytes((checkpoint / file).stat().st_size) if content is None else content)
    _renew(checkpoint)
    (error,) = run_ranks(1, _resume_error, model, _fields(tmp_path))
    assert error.startswith(f"{named} is damaged (") and "; there is no other whole checkpoint beside it" in error


def _renew(checkpoint: Path, **changes: Any) -> None:
    """A manifest of the files as they are."""
    then = json.loads((checkpoint / "manifest.json").read_text())
    manifest.write_manifest(checkpoint, then, {})
    now = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**now, **changes}))


def _all_bytes(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_a_checkpoint_with_a_damaged_manifest_is_not_whole(content: str, made: Path, tmp_path: Path) -> None:
    for step in (3, 4):
        shutil.copytree(made / "checkpoint-3", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4" / "manifest.json").write_text(content)
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-3"
    with pytest.raises(UserError, match="checkpoint-4/manifest.json is damaged; resume_from_checkpoint=.*-3 is"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-4"))


def _adam_of_a_resumed_run(path: str, fields: dict[str, Any]) -> list[tuple[Any, ...]]:
    trainer = SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS)
    trainer.train("latest")
    groups = trainer.policy._optimizer.param_groups
    return [(group["betas"], group["eps"], group["weight_decay"] > 0) for group in groups]


def test_a_resumed_runs_adam_is_its_own(model: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "checkpoint-3", tmp_path / "checkpoint-3")
    changed = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.125, "weight_decay": 0.1, "max_steps": 4}
    (groups,) = run_ranks(1, _adam_of_a_resumed_run, model, _fields(tmp_path, **changed))
    assert [group[:2] for group in groups] == [((0.5, 0.75), 0.125)] * len(groups)
    assert any(decays for *_, decays in groups)


def _train_error(path: str, fields: dict[str, Any], given: dict[str, Any] | None = None) -> str:
    try:
        SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS, **(given or {})).train()
    except UserError as error:
        return str(error)
    return "no error"


def test_a_place_where_nothing_can_be_written_is_one_sentence(model: str, tmp_path: Path) -> None:
    def told(directory: Path, **fields: Any) -> str:
        return run_ranks(1, _train_error, model, _fields(directory, max_steps=1, **fields))[0]

    assert "'/proc' cannot be written to (" in told(Path("/proc"))
    (tmp_path / "metrics.jsonl").mkdir()
    assert "metrics.jsonl is a directory" in told(tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "checkpoint-1").write_text("")
    assert re.search("cannot write the checkpoint .*checkpoint-1 .*Not a directory", told(tmp_path, save_steps=1))


def test_the_model_is_not_written_over_itself(model: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    (error,) = run_ranks(1, _train_error, model, _fields(tmp_path / "link"))
    assert "is also the directory of model, which the trained model would overwrite; choose another" in error


@pytest.mark.parametrize(("given", "told"), [("llama", "'llama'"), (str, "str")])
def test_what_is_no_tokenizer_is_refused(given: Any, told: str, model: str, tmp_path: Path) -> None:
    (error,) = run_ranks(1, _train_error, model, _fields(tmp_path), {"processing_class": given})
    assert f"processing_class={told} is not a tokenizer" in error


@pytest.fixture(scope="module")
def made(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    run_ranks(1, train_sft, model, ROWS, _fields(directory, max_steps=3))
    return directory


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
