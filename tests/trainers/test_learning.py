"""That preference trainers learn what their pairs say, on pairs that they have not seen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import megalign
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model

GOOD = range(10, 40)  # a better answer has more of these tokens


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def answer(good: int) -> list[int]:
        words = [draw.choice(GOOD) for _ in range(good)] + [draw.randrange(40, 101) for _ in range(8 - good)]
        draw.shuffle(words)
        return words

    rows = []
    for _ in range(count):
        better = draw.randint(5, 8)
        prompt = [draw.randrange(3, 101) for _ in range(4)]
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": answer(better), "rejected_ids": answer(draw.randint(0, better - 3))}
        )
    return rows


def train(kind: str, path: str, directory: str) -> list[dict[str, Any]]:
    rows, held_out = pairs(256, 1), pairs(64, 2)
    if kind == "Reward":
        for row in [*rows, *held_out]:
            prompt = row.pop("prompt_ids")
            row.update({name: prompt + ids for name, ids in row.items()})
    config = getattr(megalign, f"{kind}Config")(
        output_dir=directory, bf16=False, max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3,
        logging_steps=20, save_strategy="no", disable_tqdm=True, eval_on_start=True, per_device_eval_batch_size=32,
    )  # fmt: skip
    trainer = getattr(megalign, f"{kind}Trainer")(path, args=config, train_dataset=rows, eval_dataset=held_out)
    trainer.train()
    trainer.evaluate()
    return [line for line in trainer.state.log_history if "eval_loss" in line]


@pytest.mark.parametrize(
    ("kind", "accuracy"), [("Reward", "accuracy"), ("DPO", "rewards/accuracies"), ("ORPO", "rewards/accuracies")]
)
def test_held_out_pairs_are_told_apart(kind: str, accuracy: str, tmp_path: Path) -> None:
    path = save_tiny_model("llama", tmp_path / "model")
    (history,) = run_ranks(1, train, kind, path, str(tmp_path / "out"))
    before, after = history
    # 64 coin flips give more than 48 right in one of 10,000 cases.
    assert before[f"eval_{accuracy}"] < 0.75 < 0.9 < after[f"eval_{accuracy}"]
    assert after["eval_loss"] < before["eval_loss"]
    if kind == "DPO":
        assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert after["eval_rewards/margins"] > 0.1
