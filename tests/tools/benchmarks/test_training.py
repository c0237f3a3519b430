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


@pytest.mark.parametrize(
    ("job", "number", "theirs", "told"),
    [
        ("sft", 0, {"loss": 1.0}, None),
        ("sft", 0, {"loss": 1.01}, "loss is 1 of megalign's step and 1.01 of TRL's"),
        ("sft", 2, {"loss": 1.01}, None),  # later steps of rounded weights drift apart
        ("dpo", 1, {"loss": 1.0, "logps/chosen": -50.0, "logps/rejected": -51.0}, "logps/rejected is -50 of"),
        ("sft", 0, {"loss": float("nan")}, "loss is 1 of megalign's step and nan"),
    ],
)
def test_a_peer_that_computes_something_else_is_an_error(
    job: str, number: int, theirs: dict[str, float], told: str | None
) -> None:
    ours = STEP._replace(logs={"loss": 1.0, "logps/chosen": -50.0, "logps/rejected": -50.0})
    if told is None:
        training.check_same_work(job, "float32", number, ours, STEP._replace(logs=theirs))
    else:
        with pytest.raises(UserError, match=told):
            training.check_same_work(job, "float32", number, ours, STEP._replace(logs=theirs))


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


@pytest.mark.parametrize("job", ["sft", "dpo"])
def test_both_engines_take_their_steps(job: str, tmp_path: Path, measured: Callable[..., Any]) -> None:
    model = save_model(tmp_path / "model")
    words = ["--model", model, "--dtype", "float32", "--batch", 2]
    if job == "sft":
        words += ["--dataset", write_rows(tmp_path / "rows.jsonl", sums(8))]
    entries, made_on = measured(job, *words)
    assert [entry["engine"] for entry in entries] == ["megalign", "trl"]
    # A process with torch in it holds more than 100 MB; bytes, not the kernel's kilobytes.
    assert all(entry["peak_rss"] > 1e8 and entry["tokens_per_s"] > 0 and entry["cpu_s"] > 0 for entry in entries)
    assert entries[0]["ratio"] == pytest.approx(entries[1]["median_s"] / entries[0]["median_s"])
    assert entries[0]["losses"] == pytest.approx(entries[1]["losses"], rel=1e-4)
    assert entries[0]["mfu"] == pytest.approx(entries[0]["flops"] / 8e9)
    assert made_on["flops_fp32"] == 8e9 and made_on["versions"]["torch"] == torch.__version__
