"""SFTTrainer end to end on tiny random models: the reference is a plain PyTorch and transformers loop."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, TrainingArguments, get_scheduler
from transformers import Trainer as HfTrainer

from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.trainers.grpo import GRPOTrainer
from megalign.trainers.sft import SFTTrainer
from tests.ranks import run_ranks
from tests.tiny import load_reference, save_tiny_model
from tests.trainers.grpo_runs import save_model_with_tokenizer
from tests.trainers.runs import Recorder, metric_lines, sft_fields, token_rows, train_sft


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def _nll(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    ids = torch.tensor([row["input_ids"]])
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return -(logprobs * torch.tensor(row["completion_mask"][1:])).sum()


def plain_loop(path: str, batches: list[list[dict[str, Any]]], *, learning_rate: float, steps: int) -> list[float]:
    """Losses of AdamW as transformers' Trainer would run it: linear decay, gradients clipped to 1."""
    model = load_reference(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, 0, steps)
    losses = []
    for batch in batches:
        tokens = sum(sum(row["completion_mask"][1:]) for row in batch)
        loss = torch.stack([_nll(model, row) for row in batch]).sum() / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


LAYOUTS = {1: {}, 2: {"tensor_model_parallel_size": 2}, 4: {"pipeline_model_parallel_size": 2}}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_are_those_of_a_plain_loop(world: int, model: str, tmp_path: Path) -> None:
    rows = token_rows(20)
    layout = LAYOUTS[world]
    dp = 2 if world == 4 else 1
    fields = {"output_dir": str(tmp_path), "max_steps": 5, "gradient_accumulation_steps": 2 // dp, **layout}
    results = run_ranks(world, train_sft, model, rows, fields)
    losses = [line["loss"] for line in results[0]["history"] if "loss" in line]
    batches = [rows[start : start + 4] for start in range(0, 20, 4)]
    expected = plain_loop(model, batches, learning_rate=1e-2, steps=5)
    assert losses == pytest.approx(expected, abs=1e-4)
    untrained = plain_loop(model, batches, learning_rate=0.0, steps=5)
    assert abs(untrained[-1] - expected[-1]) > 0.05  # the updates show in the losses


def test_a_short_last_batch_is_trained_on_like_the_others(model: str, tmp_path: Path) -> None:
    rows = token_rows(7)
    fields = {"output_dir": str(tmp_path), "num_train_epochs": 2.0, "gradient_accumulation_steps": 2}
    (result,) = run_ranks(1, train_sft, model, rows, fields)
    batches = [rows[:4], rows[4:]] * 2
    losses = [line["loss"] for line in result["history"] if "loss" in line]
    assert losses == pytest.approx(plain_loop(model, batches, learning_rate=1e-2, steps=4), abs=1e-4)
    assert result["epochs"] == [0.5, 1.0, 1.5, 2.0]


def test_the_trained_model_is_left_in_hugging_face_form(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 2}
    run_ranks(1, train_sft, model, token_rows(8), fields)
    before, after = load_reference(model).state_dict(), load_reference(str(tmp_path)).state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_tokenizer_is_left_as_it_was_trained_with(tmp_path: Path) -> None:
    path = save_model_with_tokenizer(tmp_path / "model")
    (tmp_path / "turns.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    plain = {"output_dir": str(tmp_path / "plain"), "max_steps": 1}
    changed = {"eos_token": "t3", "chat_template_path": str(tmp_path / "turns.jinja")}
    run_ranks(1, train_sft, path, token_rows(4), plain)
    run_ranks(1, train_sft, path, token_rows(4), {**plain, **changed, "output_dir": str(tmp_path / "changed")})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "changed")
    assert tokenizer.eos_token == "t3"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "t5"}], tokenize=False) == "t5 "
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (Path(path) / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token == "t2"
    assert _end_tokens(tmp_path / "plain") == _end_tokens(Path(path)) == (2, 2)
    assert _end_tokens(tmp_path / "changed") == (3, [3, 2])


def _end_tokens(directory: Path) -> tuple[Any, Any]:
    files = (directory / name for name in ("config.json", "generation_config.json"))
    return tuple(json.loads(file.read_text())["eos_token_id"] for file in files)


def test_a_given_tokenizer_is_changed_and_left_with_the_model_in_the_same_way(tmp_path: Path) -> None:
    path = save_model_with_tokenizer(tmp_path / "model")
    (tmp_path / "turns.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    changed = {"eos_token": "t3", "chat_template_path": str(tmp_path / "turns.jinja")}
    for name, fields in {"as it is": {}, "changed": changed}.items():
        given = AutoTokenizer.from_pretrained(path, eos_token="t9")
        fields = {"output_dir": str(tmp_path / name), "max_steps": 1, **fields}
        run_ranks(1, train_sft, path, token_rows(4), fields, {"processing_class": given})
    assert _end_tokens(tmp_path / "as it is") == (9, [9, 2])
    assert AutoTokenizer.from_pretrained(tmp_path / "as it is").eos_token == "t9"
    assert _end_tokens(tmp_path / "changed") == (3, [3, 2])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "changed")
    assert tokenizer.eos_token == "t3"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "t5"}], tokenize=False) == "t5 "


def _files_and_evaluations(path: str, fields: dict[str, Any]) -> tuple[tuple[bool, bool], tuple[Any, Any]]:
    rows = token_rows(8)
    trainer = SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=rows, eval_dataset=rows[:5])
    before = trainer.evaluate()
    made = Path(fields["output_dir"], ".tokenized").is_dir()
    trainer.train()
    after = trainer.evaluate()
    return (made, Path(fields["output_dir"], ".tokenized").exists()), (before, after)


def test_prepared_rows_do_not_stay_with_the_model_and_can_still_be_evaluated(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 0.0}
    for (made, kept), (before, after) in run_ranks(2, _files_and_evaluations, model, fields):
        assert made and not kept
        assert after["eval_loss"] == before["eval_loss"]


def test_evaluation_counts_every_row_once(model: str, tmp_path: Path) -> None:
    rows = token_rows(5, seed=9)
    fields = {"output_dir": str(tmp_path), "max_steps": 2, "eval_on_start": True, "eval_strategy": "steps"}
    fields |= {"per_device_eval_batch_size": 2, "eval_steps": 2}
    results = run_ranks(2, train_sft, model, token_rows(8), fields, {"eval_dataset": rows})
    lines = [line for line in metric_lines(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 2]
    for step, path in ((0, model), (1, str(tmp_path))):
        trained = load_reference(path)
        with torch.no_grad():
            nll = sum(_nll(trained, row) for row in rows) / sum(sum(row["completion_mask"][1:]) for row in rows)
        assert lines[step]["eval_loss"] == pytest.approx(nll.item(), abs=1e-5)
        assert all(name == "step" or name.startswith("eval_") for name in lines[step])
    assert results[0]["history"][0]["eval_loss"] == results[1]["history"][0]["eval_loss"]


def test_metrics_file_has_a_full_line_for_each_logged_step(model: str, tmp_path: Path) -> None:
    rows = token_rows(8)
    fields = {"output_dir": str(tmp_path), "max_steps": 4, "logging_steps": 2, "lr_scheduler_type": "constant"}
    (result,) = run_ranks(1, train_sft, model, rows, fields)
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    (once,) = run_ranks(1, train_sft, model, rows, {**fields, "logging_steps": 1})
    losses = [line["loss"] for line in once["history"] if "loss" in line]
    assert [line["loss"] for line in lines] == [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    names = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "entropy", "mean_token_accuracy"}
    assert names <= lines[0].keys()
    assert lines[-1]["num_tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert result["output"].training_loss == pytest.approx(sum(losses) / 4)


def test_steps_that_do_not_fill_a_logging_window_are_written_at_the_end(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 3, "logging_steps": 2}
    (result,) = run_ranks(1, train_sft, model, token_rows(8), fields)
    written = metric_lines(tmp_path)
    assert [line["step"] for line in written] == [2, 3]
    summary = result["output"].metrics
    assert written[1]["epoch"] == 0.75
    losses = written[0]["loss"], written[1]["loss"]
    assert summary["train_loss"] == pytest.approx((2 * losses[0] + losses[1]) / 3)
    assert {"grad_norm", "learning_rate", "num_tokens"} <= written[1].keys()
    # What callbacks hear is transformers' alone.
    assert [line["step"] for line in result["history"]] == [2, 3] and "loss" not in result["history"][-1]


def train_with_bad_steps(model: str, output_dir: str) -> tuple[float, list[float | None]]:
    class Poisoned(SFTTrainer):
        def loss(self, *inputs: Any) -> Any:
            value, metrics = super().loss(*inputs)
            return value * (float("nan") if self.state.global_step < 2 else 1.0), metrics

    trainer = Poisoned(model, SFTConfig(**sft_fields(output_dir=output_dir, max_steps=4)), train_dataset=token_rows(8))
    output = trainer.train()
    return output.training_loss, [line["loss"] for line in metric_lines(output_dir)]


def test_the_mean_loss_of_a_run_is_of_the_steps_that_were_not_skipped(model: str, tmp_path: Path) -> None:
    ((mean, losses),) = run_ranks(1, train_with_bad_steps, model, str(tmp_path))
    assert losses[:2] == [None, None] and mean == pytest.approx(sum(losses[2:]) / 2)


def test_events_are_those_of_transformers_trainer(model: str, tmp_path: Path) -> None:
    common = dict(num_train_epochs=2.0, per_device_train_batch_size=2, logging_steps=3, save_strategy="epoch")
    common |= dict(eval_strategy="steps", eval_steps=3, eval_on_start=True, disable_tqdm=True)
    rows = token_rows(7)
    recorder = Recorder()
    args = TrainingArguments(output_dir=str(tmp_path / "hf"), report_to="none", use_cpu=True, **common)
    padded = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in rows]
    HfTrainer(load_reference(model), args, train_dataset=padded, eval_dataset=padded, callbacks=[recorder]).train()
    expected = [event for event in recorder.events if event != "on_prediction_step"]
    fields = {"output_dir": str(tmp_path / "ours"), **common}
    (result,) = run_ranks(1, train_sft, model, rows, fields, {"eval_dataset": rows})
    assert result["events"] == expected


def test_tensorboard_holds_every_logged_number(model: str, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "max_steps": 3, "report_to": ["tensorboard"]}
    run_ranks(2, train_sft, model, token_rows(12), {**fields, "tensor_model_parallel_size": 2})
    (run,) = (tmp_path / "runs").iterdir()  # one rank reports
    events = EventAccumulator(str(run)).Reload()
    lines = metric_lines(tmp_path)
    for name in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy"):
        logged = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/{name}")]
        assert logged == [(line["step"], pytest.approx(line[name])) for line in lines]


def test_a_hub_style_name_that_is_nowhere_is_named() -> None:
    with pytest.raises(UserError, match="/no/such/place.*does not exist"):
        SFTTrainer("/no/such/place", SFTConfig())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peft_config": object()}, "peft_config.*refused.*adapters"),
        ({"optimizers": (object(), None)}, "optimizers.*refused.*learning_rate"),
        ({"formatting_func": str}, "formatting_func.*refused.*dataset.map"),
        ({"eval_datasets": []}, "no argument eval_datasets; did you mean eval_dataset"),
        ({"max_seq_length": 5}, r"no argument max_seq_length: it is now args=SFTConfig\(max_length=...\)"),
        ({"packing": True}, r"no argument packing: it is now args=SFTConfig\(packing=...\)"),
        ({"tokenizer": object()}, "no argument tokenizer: it is now processing_class"),
    ],
)
def test_constructor_arguments_that_are_not_there_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SFTTrainer("unused", SFTConfig(), **given)


def test_arguments_that_ask_for_nothing_are_not_refused() -> None:
    with pytest.raises(UserError, match="hub|does not exist"):
        SFTTrainer("./missing", SFTConfig(), peft_config=None, optimizers=(None, None))


def _error_of(path: str, fields: dict[str, Any], given: dict[str, Any]) -> str:
    try:
        SFTTrainer(path, SFTConfig(**fields), **given).train()
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"eval_strategy": "steps"}, {"train_dataset": token_rows(2)}, "eval_strategy='steps' needs an eval_dataset"),
        ({"eval_on_start": True}, {"train_dataset": token_rows(2)}, "eval_on_start=True needs an eval_dataset"),
        ({}, {}, "train_dataset has no rows"),
        ({}, {"train_dataset": IterableDataset.from_generator(token_rows)}, "train_dataset is an IterableDataset"),
        ({}, {"train_dataset": token_rows(2), "callbacks": [print]}, "is not a transformers.TrainerCallback"),
        ({}, {"train_dataset": token_rows(2), "processing_class": "llama"}, "class='llama' is not a tokenizer"),
        ({}, {"train_dataset": token_rows(2), "processing_class": str}, "processing_class=str is not a tokenizer"),
        ({"report_to": ["nowhere"]}, {"train_dataset": token_rows(2)}, "report_to=.*nowhere is not supported"),
        (
            {"resume_from_checkpoint": "checkpoint-7"},
            {"train_dataset": token_rows(2)},
            "resume_from_checkpoint=checkpoint-7 is not a directory",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(
    model: str, tmp_path: Path, fields: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    (error,) = run_ranks(1, _error_of, model, {"output_dir": str(tmp_path), **fields}, given)
    assert re.search(message, error), error
    assert "\n" not in error


def test_a_layout_that_does_not_divide_is_named_before_rows_are_read(tmp_path: Path) -> None:
    path = save_tiny_model("llama", tmp_path / "model", num_hidden_layers=3)
    fields = {"output_dir": str(tmp_path / "out"), "pipeline_model_parallel_size": 2}
    for error in run_ranks(2, _error_of, path, fields, {"train_dataset": "no rows at all"}):
        assert "num_hidden_layers 3 at pipeline_model_parallel_size 2 leaves 3 layers for 2 stages" in error


@pytest.mark.parametrize(("ours", "theirs"), [(SFTTrainer, "SFTTrainer"), (GRPOTrainer, "GRPOTrainer")])
def test_every_argument_of_trls_constructor_is_taken_or_refused_by_name(ours: type, theirs: str) -> None:
    import trl

    taken = {name for kind in ours.__mro__ for name in inspect.signature(kind.__init__).parameters}
    for name in inspect.signature(getattr(trl, theirs).__init__).parameters:
        if name not in taken:
            with pytest.raises(UserError, match=f"{theirs}\\({name}=...\\) is refused: .+"):
                ours("unused", **{name: object()})
