"""KTOTrainer: what its evaluation depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalign.config import KTOConfig
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model

ROWS = [{"prompt_ids": [5, 6 + n], "completion_ids": [40 + n, 50 + 3 * n], "label": n % 2 == 0} for n in range(8)]


def evaluated(paths: list[str], output_dir: str, size: int, dp: int) -> dict[str, Any]:
    from megalign.trainers.kto import KTOTrainer

    args = KTOConfig(
        output_dir=output_dir, bf16=False, max_steps=1, beta=1.0, per_device_train_batch_size=size // dp,
        per_device_eval_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    metrics = KTOTrainer(*paths, args, train_dataset=ROWS, eval_dataset=ROWS).evaluate()
    return {name: metrics[name] for name in ("eval_loss", "eval_kl", "eval_rewards/chosen")}


def test_an_evaluation_knows_no_training_batch_size(tmp_path: Path) -> None:
    paths = [save_tiny_model("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    found = [
        run_ranks(dp, evaluated, paths, str(tmp_path / f"{size} {dp}"), size, dp)[0]
        for size, dp in ((2, 1), (4, 1), (8, 2))
    ]
    assert found[0]["eval_kl"] > 0.01
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2
