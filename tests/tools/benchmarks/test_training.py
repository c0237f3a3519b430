"""sft, dpo and grpo beside TRL."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalign.errors import UserError
from tests.jobs.inputs import save_model, sums, write_rows
from tests.tools.benchmarks.limits import LIMITS
from tools import benchmark
from tools.benchmarks import training
from tools.benchmarks.models import multiplied_weights

STEP = training.Step(1.0, 5.0, 600, {"loss": 1.0}, 7)


def test_an_entry_of_each_engine() -> None:
    steps = {
        "megalign": [STEP._replace(seconds=seconds) for seconds in (1.0, 3.0, 2.0)],
        "trl": [STEP._replace(seconds=seconds, cpu_seconds=9.0, device_peak=0) for seconds in (2.0, 9.0, 4.0)],
    }
    ours, trls = training.summarize("sft", steps, {"megalign": 10, "trl": 20})
    assert ours == {
        "job": "sft",
        "engine": "megalign",
        "median_s": 2.0,
        "seconds": [1.0, 3.0, 2.0],
        "cpu_s": 5.0,
        "tokens_per_s": 300.0,
        "ratio": 2.0,
        "losses": [1.0] * 3,
        "peak_rss": 10,
        "peak_device": 7,
    }
    assert trls["ratio"] == 1.0 and trls["tokens_per_s"] == 120.0 and trls["peak_rss"] == 20


def test_operations_are_held_against_the_machines_better_rate(tmp_path: Path) -> None:
    options = argparse.Namespace(model=Path(save_model(tmp_path)))
    weights = multiplied_weights(options.model)
    entry = {"tokens_per_s": 1000.0}
    sft, dpo, grpo = (training.with_rates({**entry, "job": job}, options, LIMITS) for job in ("sft", "dpo", "grpo"))
    assert sft["flops"] == 6000 * weights and dpo["flops"] == 8000 * weights
    assert sft["mfu"] == 6000 * weights / 8e9 and grpo["mfu"] is None


LOGS = {"loss": 1.0, "grad_norm": 3.0, "logps/chosen": -50.0, "logps/rejected": -50.0}


@pytest.mark.parametrize(
    ("job", "dtype", "number", "theirs", "told"),
    [
        ("sft", "float32", 0, {}, None),
        ("sft", "float32", 0, {"loss": 1.01}, "loss is 1 of megalign's step and 1.01 of TRL's"),
        ("sft", "float32", 1, {"grad_norm": 3.01}, "grad_norm is 3 of megalign's step and 3.01 of TRL's"),
        ("sft", "float32", 0, {"loss": 1.0 + 9e-4}, None),
        ("sft", "float32", 2, {"loss": 1.01}, None),  # later steps of rounded weights drift apart
        ("sft", "float32", 0, {"loss": float("nan")}, "loss is 1 of megalign's step and nan"),
        ("sft", "bfloat16", 0, {"loss": 1.03}, "loss is 1 of megalign's step and 1.03 of TRL's"),
        ("sft", "bfloat16", 0, {"grad_norm": 3.2}, None),  # as far as rounding moves either; fp32's was compared
        ("dpo", "float32", 1, {"loss": 1.01}, "loss is 1 of megalign's step and 1.01 of TRL's"),
        ("dpo", "float32", 1, {"logps/rejected": -51.0}, "logps/rejected is -50 of"),
        ("dpo", "bfloat16", 0, {"loss": 1.05}, "loss is 1 of"),
        ("dpo", "bfloat16", 1, {"loss": 1.05}, None),
        ("dpo", "bfloat16", 1, {"logps/chosen": -52.0}, "logps/chosen is -50 of"),
    ],
)
def test_a_peer_that_computes_something_else_is_an_error(
    job: str, dtype: str, number: int, theirs: dict[str, float], told: str | None
) -> None:
    ours, trls = STEP._replace(logs=LOGS), STEP._replace(logs={**LOGS, **theirs})
    if told is None:
        training.check_same_work(job, dtype, number, ours, trls)
    else:
        with pytest.raises(UserError, match=told):
            training.check_same_work(job, dtype, number, ours, trls)


def test_a_gradient_of_nothing_is_rounding_and_a_loss_of_nothing_is_not() -> None:
    ours, trls = (STEP._replace(logs={"loss": 0.0, "grad_norm": norm}) for norm in (2e-8, 3e-8))
    training.check_same_work("sft", "float32", 0, ours, trls)
    with pytest.raises(UserError, match="loss is 0 of"):
        training.check_same_work("sft", "float32", 0, ours, trls._replace(logs={**trls.logs, "loss": 5e-7}))


@pytest.mark.parametrize("job", ["sft", "dpo"])
def test_what_is_timed_in_bf16_is_compared_in_fp32_first(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Worker:
        def __init__(self, name: str, scratch: str, target: Any, engine: str, options: argparse.Namespace, *_: Any):
            asked.append(options.dtype)
            self.loss = 1.0 if engine == "megalign" else 1.01

        def step(self) -> training.Step:
            return STEP._replace(logs={**LOGS, "loss": self.loss})

        def dismiss(self) -> None:
            pass

        stop = dismiss

    monkeypatch.setattr(training, "Worker", Worker)
    options = benchmark.parse_arguments([job, "--dtype", "bfloat16"])
    options.model = Path("unused")
    monkeypatch.setattr(training, "found_model", lambda model: model)
    with pytest.raises(UserError, match=r"1.01 of TRL's, further apart than 0.001 of it in float32"):
        training.run(options)
    assert asked == ["float32", "float32"]


def test_a_peer_that_sees_other_tokens_is_an_error() -> None:
    with pytest.raises(UserError, match="fed 600 tokens of the step's rows to its model and TRL 601"):
        training.check_same_work("sft", "bfloat16", 5, STEP, STEP._replace(tokens=601))
    training.check_same_work("grpo", "bfloat16", 5, STEP, STEP._replace(tokens=601))  # sampled: theirs are others


def test_both_engines_have_configs_of_the_same_grpo() -> None:
    options = benchmark.parse_arguments(["grpo", "--no-share-prefixes", "--batch", "16", "--dtype", "float32"])
    ours, trls = (training.make_config(engine, options, "unused") for engine in training.ENGINES)
    shared = training.shared_arguments(options, "").keys() - {"output_dir"}
    assert {name: getattr(ours, name) for name in shared} | {"report_to": 0} == {
        name: getattr(trls, name) for name in shared
    } | {"report_to": 0}
    assert (ours.share_prefixes, ours.num_generations, ours.per_device_train_batch_size) == (False, 8, 16)


@pytest.mark.parametrize(("job", "dtype"), [("sft", "float32"), ("dpo", "float32"), ("dpo", "bfloat16")])
def test_both_engines_take_their_steps(job: str, dtype: str, tmp_path: Path, measured: Callable[..., Any]) -> None:
    model = save_model(tmp_path / "model")
    words = ["--model", model, "--dtype", dtype, "--batch", 2]
    if job == "sft":
        words += ["--dataset", write_rows(tmp_path / "rows.jsonl", sums(8))]
    entries, made_on = measured(job, *words)
    assert [entry["engine"] for entry in entries] == ["megalign", "trl"]
    # A process with torch in it holds more than 100 MB; bytes, not the kernel's kilobytes.
    assert all(entry["peak_rss"] > 1e8 and entry["tokens_per_s"] > 0 and entry["cpu_s"] > 0 for entry in entries)
    assert entries[0]["ratio"] == pytest.approx(entries[1]["median_s"] / entries[0]["median_s"])
    assert entries[0]["losses"] == pytest.approx(entries[1]["losses"], rel=1e-4 if dtype == "float32" else 1e-2)
    assert entries[0]["mfu"] == pytest.approx(entries[0]["flops"] / 8e9)
    assert made_on["flops_fp32"] == 8e9 and made_on["versions"]["torch"] == torch.__version__
