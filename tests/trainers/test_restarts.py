"""An engine that raises or stalls while it samples: started anew once, with nothing changed; then the run stops."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megalign.batch import Completion
from megalign.config import GRPOConfig
from megalign.errors import UserError
from megalign.rollout.failing import failing_after
from megalign.trainers.sampling import Place
from tests.ranks import run_ranks
from tests.trainers.grpo_runs import (
    RandomRollout,
    closeness,
    grpo_fields,
    prompt_rows,
    save_model_with_tokenizer,
)
from tests.trainers.runs import digest

TIMEOUT = 0.3


class FailingRollout(RandomRollout):
    """Fails at the calls that `faults` names by (engine of the run, call), on the last rank alone."""

    faults: dict[tuple[int, int], str] = {}
    made: list[FailingRollout] = []

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.place, self.calls, self.closed = len(self.made), 0, False
        self.fails = given[2].world.rank == given[2].world.size - 1
        self.made.append(self)

    def generate(self, *given: Any) -> list[Completion]:
        """As random as ever, or a fault."""
        assert not self.closed and self.seen_weights, "the engine has no weights"
        self.calls += 1
        fault = self.faults.get((self.place, self.calls)) if self.fails else None
        with failing_after(TIMEOUT if fault == "stalls" else 60):
            if fault == "raises":
                raise RuntimeError("CUDA error:\n an illegal memory access")
            if fault == "stalls":
                time.sleep(60)
            return super().generate(*given)

    def close(self) -> None:
        """Noted."""
        self.closed = True


def train(path: str, fields: dict[str, Any], faults: dict[tuple[int, int], str]) -> dict[str, Any]:
    """Three rounds on the calling ranks."""
    from megalign.trainers import online
    from megalign.trainers.grpo import GRPOTrainer

    FailingRollout.faults, FailingRollout.made = faults, []
    real, online.VllmEngine = online.VllmEngine, FailingRollout
    found: dict[str, Any] = {"error": None}
    try:
        args = GRPOConfig(**grpo_fields(max_steps=3, per_device_train_batch_size=4, **fields))
        trainer = GRPOTrainer(path, [closeness], args, train_dataset=prompt_rows(8))
        trainer.train()
    except UserError as error:
        found["error"] = str(error)
    finally:
        online.VllmEngine = real
    found["history"] = trainer.state.log_history
    found["weights"] = [engine.seen_weights for engine in FailingRollout.made]
    found["closed"] = [engine.closed for engine in FailingRollout.made]
    found["digest"] = digest(fields["output_dir"])
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, train, model, {"output_dir": str(tmp_path_factory.mktemp("whole"))}, {})[0]


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("fault", ["raises", "stalls"])
def test_a_fresh_engine_samples_the_round_again_and_nothing_else_changes(
    fault: str, asleep: bool, model: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    fields = {"output_dir": str(tmp_path), "vllm_enable_sleep_mode": asleep}
    for rank in run_ranks(2, train, model, fields, {(0, 2): fault}):
        assert rank["error"] is None and rank["digest"] == undisturbed["digest"]
        assert [line.get("vllm_restarts") for line in rank["history"]] == [None, 1, None, None]
        assert rank["closed"] == [True, False]
        first, second = rank["weights"]
        assert first[-1] == second[0]  # synced anew with the weights of the same step


@pytest.mark.parametrize(("second", "again"), [((1, 1), "in the same round"), ((1, 2), "in a later one")])
def test_the_second_failure_stops_every_rank_with_the_cause(
    second: tuple[int, int], again: str, model: str, tmp_path: Path
) -> None:
    faults = {(0, 1): "raises", second: "raises"}
    for rank in run_ranks(2, train, model, {"output_dir": str(tmp_path)}, faults):
        assert rank["error"].startswith(
            "vLLM failed on rank 1: RuntimeError: CUDA error: an illegal memory access; it had been started anew once"
        ), again
        assert len(rank["closed"]) == 2 and "\n" not in rank["error"]


def with_vllm(path: str, output_dir: str) -> dict[str, Any]:
    """On a rank: the same place sampled before and after a real engine's failure."""
    from megalign.trainers.grpo import GRPOTrainer
    from megalign.trainers.schedule import plan_steps

    fields = {"vllm_max_model_length": 64, "vllm_cpu_kv_cache_gib": 0.0625, "output_dir": output_dir}
    trainer = GRPOTrainer(path, [closeness], GRPOConfig(**grpo_fields(**fields)), train_dataset=prompt_rows(8))
    trainer.run.begin(plan_steps(trainer.args, trainer.micro_steps_per_epoch(), 1))
    prompts = [trainer.train_rows[row] for row in range(2)]
    found = {"before": trainer.sampling(prompts, 4, Place("train", 5)).completions}
    first = trainer.rollout

    def breaks(*given: Any, **options: Any) -> None:
        raise ValueError("the engine core has died")

    first._llm.generate = breaks
    found["after"] = trainer.sampling(prompts, 4, Place("train", 5)).completions
    found["fresh"] = trainer.rollout is not first and not hasattr(first, "_llm")
    trainer.rollout._llm.generate = breaks
    try:
        trainer.sampling(prompts, 4, Place("train", 5))
    except UserError as error:
        found["error"] = str(error)
    return found


@pytest.mark.vllm
def test_a_real_engine_is_started_anew_and_answers_as_before(model: str, tmp_path: Path) -> None:
    (found,) = run_ranks(1, with_vllm, model, str(tmp_path), timeout=240, fresh=True)
    assert found["fresh"] and found["after"] == found["before"]
    assert found["error"].startswith("vLLM failed on rank 0: ValueError: the engine core has died; it had been started")
