"""tools/benchmark.py's flags, and what it refuses before it measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalign.errors import UserError
from tests.jobs.start import ROOT, environment
from tools import benchmark
from tools.benchmarks.models import found_model


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--help"], 0, "benchmark.py startup"),
        (["grpo", "--help"], 0, "--no-share-prefixes"),
        (["sft", "--no-share-prefixes"], 2, "unrecognized arguments: --no-share-prefixes"),
        (["dpo", "--repetitions", "0"], 2, "--repetitions 0 must be at least 1"),
        (["logprob", "--help"], 0, "(default: 2048)"),
        (["sft", "--batch", "0"], 2, "--batch 0 must be at least 1"),
        (["logprob", "--vocab", "8", "1"], 2, "--vocab 1 must be at least 2"),
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
        benchmark.check(benchmark.parse_arguments(words))


@pytest.mark.parametrize("flag", ["--json", "--plot"])
@pytest.mark.parametrize("place", ["nowhere/a.json", "."])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    flag: str, place: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{flag} {tmp_path / place} is no file's place"):
        benchmark.check(benchmark.parse_arguments(["save", flag, str(tmp_path / place)]))


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--model {tmp_path} has no config.json"):
        found_model(tmp_path)
