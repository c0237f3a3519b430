"""tools/benchmark.py: its arithmetic, its rows, and both engines really run; nothing here looks at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.jobs.inputs import save_model, sums, write_rows
from tests.jobs.start import ROOT, run
from tools.benchmark import Pair, Step, digit_share, make_rows, num_parameters, read_rows, summarize

KEYS = {"job", "engine", "median_s", "tokens_per_s", "ratio", "peak_rss", "peak_device"}


def test_the_ratio_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    # The machine was three times slower during the second pair: 2/1, 9/3 and 4/2 are what may be compared.
    seconds = [(1.0, 2.0), (3.0, 9.0), (2.0, 4.0)]
    pairs = [Pair(megalign=Step(ours, 5.0, 600, 1.0, 7), trl=Step(trls, 9.0, 600, 1.0)) for ours, trls in seconds]
    ours, trls = summarize("sft", pairs, {"megalign": 10, "trl": 20})
    assert ours == {
        "job": "sft",
        "engine": "megalign",
        "median_s": 2.0,
        "tokens_per_s": 300.0,
        "ratio": 2.0,
        "peak_rss": 10,
        "peak_device": 7,
    }
    assert trls == {
        "job": "sft",
        "engine": "trl",
        "median_s": 4.0,
        "tokens_per_s": 120.0,
        "ratio": 1.0,
        "peak_rss": 20,
        "peak_device": 0,
    }


def test_made_rows_are_right_sums_and_the_same_each_time() -> None:
    rows = make_rows("sft", 20)
    assert rows == make_rows("sft", 20)
    assert rows[:5] == make_rows("sft", 5)
    for row in rows:
        # The first number of the story is the start; every day's "gets N more" is added.
        words = row["prompt"].split()
        added = [int(after) for word, after in zip(words, words[1:], strict=False) if word == "gets"]
        assert row["completion"].endswith(f"#### {int(words[2]) + sum(added)}")


def test_rows_of_a_file_come_in_order_and_begin_again(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    assert read_rows(file, "sft", 3) == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d"},
        {"prompt": "a", "completion": "b"},
    ]
    assert read_rows(file, "grpo", 1) == [{"prompt": "a"}]


def test_a_file_without_prompts_is_refused_for_grpo(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(SystemExit, match="columns text, and grpo needs prompt"):
        read_rows(file, "grpo", 1)


def test_the_reward_is_the_share_of_digits() -> None:
    chat = [{"role": "assistant", "content": "12"}]
    assert digit_share(["a1", "", chat]) == [0.5, 0.0, 1.0]


def test_parameters_are_counted_from_the_files_headers(tmp_path: Path) -> None:
    save_model(tmp_path)
    # Tied llama: embedding and final norm; a layer has q, o (48 x 32), k, v (24 x 32), three of the mlp, two norms.
    layer = 2 * 48 * 32 + 2 * 24 * 32 + 3 * 48 * 32 + 2 * 32
    assert num_parameters(tmp_path) == 420 * 32 + 32 + 4 * layer


@pytest.mark.slow
@pytest.mark.parametrize("job", ["sft", pytest.param("grpo", marks=pytest.mark.vllm)])
def test_both_engines_take_their_steps(job: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", head_dim=32)  # a size that vLLM knows
    rows = write_rows(tmp_path / "rows.jsonl", sums(8))
    result = tmp_path / "result.json"
    command = [sys.executable, ROOT / "tools/benchmark.py", job, "--json", result, "--model", model, "--dataset", rows]
    size = {"sft": ["--batch", 2], "grpo": ["--batch", 8, "--max-completion-length", 4]}[job]
    command += ["--repetitions", 1, "--threads", 1, *size]
    run([str(word) for word in command], tmp_path, timeout=240).succeeded()
    entries = json.loads(result.read_text())
    assert [(entry["job"], entry["engine"]) for entry in entries] == [(job, "megalign"), (job, "trl")]
    assert all(set(entry) == KEYS for entry in entries)
    # A process with torch in it holds more than 100 MB; bytes, not the kernel's kilobytes.
    assert all(entry["peak_rss"] > 1e8 and entry["tokens_per_s"] > 0 for entry in entries)
    assert entries[0]["ratio"] == pytest.approx(entries[1]["median_s"] / entries[0]["median_s"])
