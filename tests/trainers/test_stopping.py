"""What one rank's callback decides, all ranks do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.ranks import run_ranks
from tests.trainers.resume_runs import ROWS, saving_fields
from tests.trainers.runs import StopAt, metric_lines, train_sft


def test_one_ranks_wish_to_stop_stops_all(model: str, tmp_path: Path) -> None:
    fields = saving_fields(tmp_path, save_strategy="no", tensor_model_parallel_size=2)
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
    fields = saving_fields(tmp_path, save_strategy="no", tensor_model_parallel_size=2)
    given = {"stop": _ChangesItsMind(), "eval_dataset": ROWS[:3]}
    results = run_ranks(2, train_sft, model, ROWS, fields, given, timeout=60)
    assert [result["output"].global_step for result in results] == [2, 2]
    assert [line["step"] for line in metric_lines(tmp_path) if "eval_loss" in line] == [2]
    assert (tmp_path / "checkpoint-2" / "manifest.json").exists()
