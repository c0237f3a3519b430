"""Every trainer at any layout on the same rows: what it logs and the gradients of its last step."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from typing import Any

from torch import Tensor

import megalign
from megalign.train_engine import TrainEngine
from tests.layouts import Layout, gradients_of
from tests.tiny import save_tiny_classifier, save_tiny_model
from tests.trainers.grpo_runs import RandomRollout, brevity, closeness, prompt_rows, save_model_with_tokenizer

OFFLINE = ("SFT", "Reward", "DPO", "KTO", "ORPO")
ONLINE = ("GRPO", "RLOO", "PPO")


def save_models(family: str, directory: Path) -> dict[str, str]:
    """A policy, a reference that differs from it everywhere, a reward model with the policy's tokenizer."""
    made = {name: directory / name for name in ("model", "reference", "reward")}
    save_model_with_tokenizer(made["model"], family)
    save_tiny_model(family, made["reference"], seed=1, head_dim=32)
    save_tiny_classifier(family, made["reward"], seed=2, head_dim=32)
    for file in made["model"].glob("tokenizer*"):
        (made["reward"] / file.name).write_bytes(file.read_bytes())
    return {name: str(path) for name, path in made.items()}


def pair_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenized pairs of very unequal lengths."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, 101) for _ in range(length)]

    return [
        {
            "prompt_ids": ids(draw.randint(1, 5)),
            "chosen_ids": ids(draw.randint(1, 12)),
            "rejected_ids": ids(draw.randint(1, 12)),
        }
        for _ in range(count)
    ]


def rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    """Rows in the form that the trainer takes."""
    pairs = pair_rows(count)
    if kind in ONLINE:
        return prompt_rows(count)
    if kind == "SFT":
        return [
            {
                "input_ids": row["prompt_ids"] + row["chosen_ids"],
                "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
            }
            for row in pairs
        ]
    if kind == "Reward":
        return [
            {
                "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
                "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
                "margin": place / 10,
            }
            for place, row in enumerate(pairs)
        ]
    if kind == "KTO":
        return [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": row["rejected_ids"] if place % 3 else row["chosen_ids"],
                "label": not place % 3,
            }
            for place, row in enumerate(pairs)
        ]
    return pairs


def run(
    kind: str, paths: dict[str, str], layout: Layout, output_dir: str, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Two steps on the calling ranks. `paths`: the model, a reference that differs from it, a reward model."""
    global_batch = 6 if kind in OFFLINE else 8
    fields = {
        "output_dir": output_dir,
        "bf16": False,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "per_device_train_batch_size": global_batch // layout.dp,
        "max_grad_norm": 0.0,  # clipping scales the gradients that are compared
        "learning_rate": 1e-2,
        # With its usual epsilon AdamW moves a weight whose gradient is rounding by the whole learning rate.
        "adam_epsilon": 1e-3,
        "use_distributed_optimizer": False,
        **layout.fields,
        **({"max_completion_length": 6} if kind in ONLINE else {}),
        **({"num_generations": 4} if kind in ("GRPO", "RLOO") else {}),
        **(options or {}),
    }
    config = getattr(megalign, f"{kind}Config")(**fields)
    given: dict[str, Any] = {"train_dataset": rows_of(kind, 10)}
    if kind in ("DPO", "KTO", "PPO"):
        given["ref_model"] = paths["reference"]
    if kind in ONLINE:
        given["reward_funcs"] = [closeness, brevity] if kind != "PPO" else [closeness, paths["reward"]]
    trainer = made(kind, paths["model"], config, given)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    gradients = {name: gradients_or_weights(engine) for name, engine in trainer.engines().items()}
    return {"lines": trainer.state.log_history[:-1], "gradients": gradients}


def made(kind: str, model: str, config: Any, given: dict[str, Any]) -> Any:
    """The trainer; one that samples gets the stand-in for vLLM."""
    from megalign.trainers import online

    real, online.VllmEngine = online.VllmEngine, RandomRollout
    try:
        return getattr(megalign, f"{kind}Trainer")(model, args=config, **given)
    finally:
        online.VllmEngine = real


def gradients_or_weights(engine: TrainEngine) -> dict[str, Tensor]:
    """Of a reference that follows the policy, the weights."""
    engine.wake()
    if engine._optimizer is not None:
        return gradients_of(engine)
    return {name: tensor.clone() for name, tensor in engine.gathered()}
