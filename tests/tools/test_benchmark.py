"""tools/benchmark.py: its arithmetic, what it refuses, and each job really run, small; nothing here looks at a time."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalign.errors import UserError
from tests.jobs.inputs import save_model, sums, write_rows
from tests.jobs.start import ROOT, environment
from tests.ranks import run_ranks
from tools import benchmark
from tools.benchmarks import engines, first_step, logprob, machine, pipeline, report, startup, sync, training
from tools.benchmarks.models import found_model, multiplied_weights
from tools.benchmarks.rows import digit_share, make_rows, read_rows

LIMITS = machine.Limits(flops=2e9, flops_fp32=8e9, copied=4e9)
STEP = training.Step(1.0, 5.0, 600, {"loss": 1.0}, 7)


@pytest.fixture
def measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Runs a job and returns (its entries, the machine's): with limits that are not measured, and processes that are
    forked where the modules are loaded already."""
    monkeypatch.setattr(machine, "measure_limits", lambda dtype: LIMITS)
    monkeypatch.setattr(engines, "CONTEXT", multiprocessing.get_context("forkserver"))
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # what the job sets goes with the test

    def run(*words: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        file, picture = tmp_path / "result.json", tmp_path / "result.png"
        ends = ["--repetitions", 1, "--threads", 1, "--json", file, "--plot", picture]
        benchmark.main([str(word) for word in [*words, *ends]])
        assert picture.read_bytes().startswith(b"\x89PNG")
        entries = json.loads(file.read_text())
        (made_on,) = {json.dumps(entry.pop("machine")) for entry in entries}
        assert all(entry["job"] == words[0] and len(entry["seconds"]) == 1 for entry in entries)
        return entries, json.loads(made_on)

    return run


# ---- the command


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--help"], 0, "benchmark.py startup"),
        (["grpo", "--help"], 0, "--no-share-prefixes"),
        (["sft", "--no-share-prefixes"], 2, "unrecognized arguments: --no-share-prefixes"),
        (["dpo", "--repetitions", "0"], 2, "--repetitions 0 must be at least 1"),
        (["grpo", "--batch", "12"], 2, "--batch 12 must be a multiple of 8"),
        (["pipeline", "--layouts", "pp3"], 2, "invalid choice: 'pp3'"),
    ],
)
def test_help_and_wrong_flags_are_answered_without_torch(words: list[str], status: int, told: str) -> None:
    code = f"""
import runpy, sys
sys.argv = ["benchmark.py", *{words!r}]
try:
    runpy.run_path({str(ROOT / "tools/benchmark.py")!r}, run_name="__main__")
finally:
    assert not {{"torch", "transformers", "rich"}} & set(sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == status and told in ended.stdout + ended.stderr, ended


@pytest.mark.parametrize(("words", "absent"), [(["sft"], "trl"), (["save", "--plot", "a.png"], "matplotlib")])
def test_what_is_not_installed_is_said_before_anything_is_measured(
    words: list[str], absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(UserError, match=f"(?i){absent}.* not installed"):
        benchmark.check_packages(benchmark.parse_arguments(words))


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--model {tmp_path} has no config.json"):
        found_model(tmp_path)


# ---- what is shared


def test_the_ratio_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    # The machine was four times slower during the second pair: 2/1, 12/4 and 3/2 are what may be compared, not 3 and 2.
    assert report.median_ratio([2.0, 12.0, 3.0], [1.0, 4.0, 2.0]) == 2.0


def test_parameters_are_counted_from_the_files_headers(tmp_path: Path) -> None:
    save_model(tmp_path)
    # Tied llama: embedding and final norm; a layer has q, o (48 x 32), k, v (24 x 32), three of the mlp, two norms.
    layer = 2 * 48 * 32 + 2 * 24 * 32 + 3 * 48 * 32 + 2 * 32
    assert multiplied_weights(tmp_path) == 420 * 32 + 32 + 4 * layer
    save_model(tmp_path, tie_word_embeddings=False)
    assert multiplied_weights(tmp_path) == 420 * 32 + 32 + 4 * layer  # an embedding beside the head multiplies nothing


def test_memory_is_what_is_held_for_a_while() -> None:
    size = 64 << 20
    with machine.PeakMemory() as peak:
        torch.ones(size // 4, device=machine.device.device()).sum()
    assert abs(peak.extra - size) < 8 << 20
    with machine.PeakMemory() as again:
        pass
    assert again.extra < 8 << 20  # what was freed before counts no more


def test_limits_are_of_this_machine() -> None:
    limits = machine.measure_limits("float32")
    assert limits.flops == limits.flops_fp32 > 1e8 and limits.copied > 1e8
    assert machine.Limits(2.0, 3.0, 1.0).best_flops == machine.Limits(3.0, 2.0, 1.0).best_flops == 3.0


def _ends_early(pipe: Any) -> None:
    pipe.recv()
    raise RuntimeError("no more")


def test_a_process_that_ends_is_told_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "CONTEXT", multiprocessing.get_context("forkserver"))
    with engines.stopped_at_the_end() as keep:
        worker = keep(engines.Worker("megalign", str(tmp_path), _ends_early))
        with pytest.raises(UserError, match="megalign ended before its step"):
            worker.step()
    assert "RuntimeError: no more" in capsys.readouterr().err


# ---- sft, dpo, grpo


def test_made_rows_are_right_sums_and_the_same_each_time() -> None:
    rows = make_rows("sft", 20)
    assert rows == make_rows("sft", 20)
    assert rows[:5] == make_rows("sft", 5)
    for row in rows:
        # The first number of the story is the start; every day's "gets N more" is added.
        words = row["prompt"].split()
        added = [int(after) for word, after in zip(words, words[1:], strict=False) if word == "gets"]
        assert row["completion"].endswith(f"#### {int(words[2]) + sum(added)}")


def test_the_prompts_of_grpo_are_as_long_as_asked_for() -> None:
    for days in (1, 8):
        assert {row["prompt"].count("On day") for row in make_rows("grpo", 5, days)} == {days}


def test_made_pairs_have_a_right_answer_and_a_wrong_one() -> None:
    for row in make_rows("dpo", 20):
        right, wrong = (int(row[name].rpartition("#### ")[2]) for name in ("chosen", "rejected"))
        assert set(row) == {"prompt", "chosen", "rejected"} and wrong > right


def test_rows_of_a_file_come_in_order_and_begin_again(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    assert read_rows(file, "sft", 3) == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d"},
        {"prompt": "a", "completion": "b"},
    ]
    assert read_rows(file, "grpo", 1) == [{"prompt": "a"}]


@pytest.mark.parametrize(("job", "needed"), [("grpo", "prompt"), ("dpo", "prompt, chosen, rejected")])
def test_a_file_without_the_jobs_columns_is_refused(job: str, needed: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=f"columns text, and {job} needs {needed}"):
        read_rows(file, job, 1)


def test_the_reward_is_the_share_of_digits() -> None:
    chat = [{"role": "assistant", "content": "12"}]
    assert digit_share(["a1", "", chat]) == [0.5, 0.0, 1.0]


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


# ---- logprob


def test_logprobs_beside_torchs(measured: Callable[..., Any]) -> None:
    entries, _ = measured("logprob", "--vocab", 40000, "--tokens", 64, "--hidden", 16, "--dtype", "float32")
    assert [(entry["what"], entry["engine"]) for entry in entries] == [
        (what, engine) for what in (logprob.GIVEN, logprob.HEAD) for engine in logprob.ENGINES
    ]
    given, torchs = entries[:2]
    logits = 64 * 40000 * 4
    # Torch holds log p, p and gradients of their size; the gradient written over the logits takes nothing.
    assert torchs["extra_bytes"] > 3 * logits and given["extra_bytes"] < logits / 2
    assert given["extra_share"] == given["extra_bytes"] / torchs["extra_bytes"]
    assert given["memory_share"] == pytest.approx(3 * logits / given["median_s"] / 4e9)
    assert entries[2]["mfu"] == pytest.approx(6 * 64 * 40000 * 16 / entries[2]["median_s"] / 8e9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", [logprob.GIVEN, logprob.HEAD])
def test_logprobs_that_differ_are_an_error(what: str, dtype: str) -> None:
    case = logprob.Case(what, 50, 12, 8, dtype)
    ours, torchs = (
        logprob.Answer(0.0, 0.0, 0, problem.results(problem.solve(engine)))
        for engine in logprob.ENGINES
        for problem in [logprob.Problem(case)]
    )
    logprob.check_same_results(case, ours, torchs)
    for name, values in torchs.results.items():
        for wrong in (1.1 * values, np.nan * values):
            with pytest.raises(UserError, match=f"megalign's {name} is .* of its size away"):
                logprob.check_same_results(case, ours._replace(results={**ours.results, name: wrong}), torchs)


# ---- sync


@pytest.mark.vllm
def test_weights_into_vllm_beside_a_copy(tmp_path: Path, measured: Callable[..., Any]) -> None:
    model = save_model(tmp_path / "model", head_dim=32)  # a size that vLLM knows
    words = ["--model", model, "--dtype", "float32", "--kv-cache-gib", 0.0625]
    entries, _ = measured("sync", *words)
    nbytes = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert [entry["what"] for entry in entries] == list(sync.WAYS)
    assert all(0.9 * nbytes < entry["bytes"] <= nbytes and entry["extra_bytes"] >= 0 for entry in entries)
    assert entries[0]["ratio"] == pytest.approx(entries[1]["median_s"] / entries[0]["median_s"])
    assert entries[1]["ratio"] == 1.0


# ---- pipeline


@pytest.mark.parametrize(
    ("name", "microbatches", "share"),
    [("pp2", 8, 1 / 9), ("pp4", 8, 3 / 11), ("pp2xvpp2", 8, 1 / 17), ("pp4xvpp2", 8, 3 / 19)],
)
def test_what_the_schedules_promise(name: str, microbatches: int, share: float) -> None:
    assert pipeline.Layout.named(name).idle_share(microbatches) == pytest.approx(share)


def test_idle_is_what_ranks_did_not_spend_in_passes() -> None:
    step = pipeline.Step.of([pipeline.Work(1.0, 9.0, 6.0, 2.0), pipeline.Work(3.0, 11.0, 8.0, 3.0)])
    assert step == (10.0, pytest.approx(0.3), 5.0)
    entry = pipeline.summarize(pipeline.Layout(2), [step, step], [step._replace(cpu_seconds=4.0)] * 2, 8)
    assert entry["idle"] == pytest.approx(0.3) and entry["idle_ratio"] == pytest.approx(2.7)
    assert entry["cpu_ratio"] == 1.25


def test_layers_and_microbatches_must_fit_the_schedule(tmp_path: Path) -> None:
    model = Path(save_model(tmp_path))
    options = argparse.Namespace(microbatches=6)
    with pytest.raises(UserError, match="4 layers .* do not divide by PP4xVPP2"):
        pipeline.check([pipeline.Layout(4, 2, sleeps=True)], model, options)
    with pytest.raises(UserError, match="--microbatches 6 must be a multiple of 4"):
        pipeline.check([pipeline.Layout(4, 1), pipeline.Layout(4, 2)], Path(pipeline.save_model(tmp_path)), options)


def test_ranks_compute_and_sleep(measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--microbatches", 2, "--tokens", 8, "--sleep-ms", 20, "--layouts", "pp2xvpp2"]
    entries, _ = measured("pipeline", *words)
    assert [(entry["layout"], entry["stages"], entry["chunks"]) for entry in entries] == [
        ("one rank, layers compute", 1, 1),
        ("PP2, layers compute", 2, 1),
        ("PP2xVPP2, layers sleep", 2, 2),
    ]
    assert [entry["promised_idle"] for entry in entries] == [None, pytest.approx(1 / 3), pytest.approx(1 / 5)]
    assert all(0 <= entry["idle"] < 1 and entry["cpu_s"] > 0 for entry in entries)
    assert entries[0]["idle"] < 0.2 and entries[1]["cpu_ratio"] > 0.2 and entries[2]["cpu_ratio"] is None
    # Each rank slept through two chunks of two layers in each pass of two microbatches, and computed next to nothing.
    assert entries[2]["median_s"] * (1 - entries[2]["idle"]) >= 2 * 4 * 0.06


# ---- startup


def test_an_entry_of_each_start() -> None:
    marks = [first_step.Marks(total, 0.1, 2.0, loading, 1.5)._asdict() for total, loading in ((6.0, 1.0), (9.0, 5.0))]
    slower = [{**one, "total": 2 * one["total"]} for one in marks]
    ours, trls = startup.summarize(startup.FIRST_STEP, {"megalign": marks, "trl": slower})
    assert ours["median_s"] == 7.5 and ours["ratio"] == 2.0 and trls["ratio"] == 1.0
    assert ours["besides_loading_s"] == 4.5 and ours["loading_s"] == 3.0 and ours["imports_s"] == 2.0
    (helped, _) = startup.summarize(startup.HELP, {"megalign": [{"total": 0.2}], "trl": [{"total": 4.0}]})
    assert helped["ratio"] == 20.0 and helped["besides_loading_s"] is None


def first_marks(engine: str, model: str) -> Sequence[float]:
    """On a rank: the marks of a first step."""
    found: list[first_step.Marks] = []

    class Told(BaseException):
        pass

    def tell(marks: first_step.Marks) -> None:
        found.append(marks)
        raise Told

    options = benchmark.parse_arguments(["startup", "--model", model, "--dtype", "float32", "--batch", "2"])
    options.job = "sft"
    try:
        first_step.measure(engine, first_step.STARTED - 0.5, options, tell)
    except Told:
        return found[0]
    raise AssertionError("no step was taken")


@pytest.mark.parametrize("engine", startup.ENGINES)
def test_where_the_time_of_a_first_step_goes(engine: str, tmp_path: Path) -> None:
    (marks,) = run_ranks(1, first_marks, engine, save_model(tmp_path / "model"), fresh=True)
    assert marks.interpreter == pytest.approx(0.5) and marks.loading > 0 and marks.step > 0
    assert marks.total > marks.interpreter + marks.imports + marks.loading + marks.step


def test_a_help_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(startup._HELP, "trl", [sys.executable, "-c", "raise SystemExit('nothing there')"])
    with pytest.raises(UserError, match="ended with 1: nothing there"):
        startup.seconds_of_help("trl")


# ---- convert, save


def test_conversions_beside_a_copy(measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.benchmarks import convert

    monkeypatch.setattr(convert, "measure_limits", lambda dtype: LIMITS)
    monkeypatch.setitem(convert.SHAPES, "1b", (2, 64, 128, 4, 2, 512))
    entries, _ = measured("convert", "--shape", "1b")
    assert [entry["what"] for entry in entries] == list(convert.WHATS)
    assert entries[0]["ratio"] == 1.0 and all(entry["peak_anon"] > 1e6 for entry in entries[1:])


def saved_entries(words: list[str]) -> None:
    """On a rank: the job begins and ends torch.distributed itself."""
    machine.measure_limits = lambda dtype: LIMITS
    benchmark.main(words)


def test_checkpoints_by_the_rank_and_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "save.json"
    words = ["save", "--model", save_model(tmp_path / "model"), "--json", file, "--repetitions", 1, "--threads", 1]
    run_ranks(1, saved_entries, [str(word) for word in words], fresh=True)
    entries = json.loads(file.read_text())
    assert [(entry["job"], entry["what"]) for entry in entries] == [
        ("save", "the rank"),
        ("save", "processes beside it"),
    ]
    assert entries[0]["ratio"] == 1.0 and all(0 < entry["held"] <= entry["written"] for entry in entries)
