"""Steps, epochs and learning rates are transformers' Trainer's own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as HfTrainer

from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.trainers.schedule import LearningRate, plan_steps

SCHEDULES = [
    ("linear", {}, 0.0),
    ("cosine", {}, 3),
    ("cosine_with_restarts", {"num_cycles": 2}, 0.2),
    ("polynomial", {"lr_end": 1e-7, "power": 2.0}, 2),
    ("constant", {}, 0.0),
    ("constant_with_warmup", {}, 0.25),
    ("inverse_sqrt", {}, 3),
    ("cosine_with_min_lr", {"min_lr": 1e-5}, 1),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}, 3),
    ("warmup_stable_decay", {"num_decay_steps": 4}, 2),
]


class _Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([1, 2, 3])
        return {"input_ids": ids, "labels": ids}


class _Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        self.epochs.append(state.epoch)


def _transformers_run(tmp_path, rows: int, **fields) -> tuple[HfTrainer, list[float]]:  # noqa: ANN001, ANN003
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    recorder = _Recorder()
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **fields
    )
    trainer = HfTrainer(LlamaForCausalLM(config), args, train_dataset=_Rows(rows), callbacks=[recorder])
    trainer.train()
    return trainer, recorder.epochs


@pytest.mark.parametrize(("name", "kwargs", "warmup"), SCHEDULES)
def test_learning_rates_are_those_of_transformers_adamw(name: str, kwargs: dict, warmup: float) -> None:
    from transformers import get_scheduler

    steps = 12
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    first = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    scheduler = get_scheduler(name, optimizer, first, steps, scheduler_specific_kwargs=kwargs)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    args = SFTConfig(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup, learning_rate=3e-4)
    rate = LearningRate(args, steps)
    assert [rate(step) for step in range(steps)] == expected


def test_a_run_of_transformers_logs_the_same_rates(tmp_path) -> None:  # noqa: ANN001
    fields = dict(max_steps=5, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0.4, logging_steps=1)
    trainer, _ = _transformers_run(tmp_path, rows=8, per_device_train_batch_size=2, **fields)
    logged = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    rate = LearningRate(SFTConfig(**fields), 5)
    assert [rate(step) for step in range(5)] == logged


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "max_steps"),
    [(8, 2, 1, 2.0, -1), (7, 2, 1, 1.5, -1), (7, 2, 3, 2.0, -1), (7, 2, 3, 3.0, 4), (3, 4, 2, 2.0, -1)],
)
def test_steps_and_epochs_are_those_of_transformers(
    tmp_path,
    rows: int,
    batch: int,
    accumulation: int,
    epochs: float,
    max_steps: int,  # noqa: ANN001
) -> None:
    fields = dict(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps,
    )
    trainer, seen = _transformers_run(tmp_path, rows, **fields)
    args = SFTConfig(**fields)
    plan = plan_steps(args, math.ceil(rows / batch), args.max_steps)
    assert (plan.max_steps, plan.num_epochs) == (trainer.state.max_steps, trainer.state.num_train_epochs)
    ours = [
        step // plan.updates_per_epoch + plan.epoch_fraction(step % plan.updates_per_epoch + 1)
        for step in range(plan.max_steps)
    ]
    assert ours == pytest.approx(seen)


def test_wrong_schedule_arguments_are_named() -> None:
    args = SFTConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"floor": 1.0})
    with pytest.raises(UserError, match="cosine_with_min_lr.*floor"):
        LearningRate(args, 10)
