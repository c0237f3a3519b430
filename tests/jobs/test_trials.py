"""What a kill counts as: a death that nobody noticed is a failure, and no trial to repeat."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.jobs import trials

WEIGHTS = b"weights"


class Over:
    """A job whose other rank has ended with 0; the victim is a process that sleeps."""

    stdout, stderr = "", ""

    def __init__(self, victim: subprocess.Popen[bytes]) -> None:
        self._victim = victim

    def process(self, rank: int) -> int | None:
        """The victim's."""
        return self._victim.pid

    def wait(self, timeout: float) -> list[int | None]:
        """The victim's status, and the other's."""
        return [self._victim.poll() if timeout == 0 else self._victim.wait(), 0]


@pytest.mark.parametrize("is_whole", [True, False])
def test_others_that_end_well_without_the_whole_model_have_missed_a_death(
    is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    @contextlib.contextmanager
    def start(words: Sequence[object], cwd: Path, ranks: int) -> Iterator[Over]:
        output_dir = Path(str(words[words.index("--output_dir") + 1]))
        steps = trials.STEPS if is_whole or started else 3
        (output_dir / f"checkpoint-{trials.STEPS}").mkdir(parents=True, exist_ok=True)
        (output_dir / f"checkpoint-{trials.STEPS}" / "manifest.json").touch()
        lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, steps + 1)]
        (output_dir / "metrics.jsonl").write_text("".join(lines))
        (output_dir / "model.safetensors").write_bytes(WEIGHTS if is_whole or started else WEIGHTS[:3])
        victim = subprocess.Popen(["sleep", "0" if started else "60"])
        started.append(victim)
        yield Over(victim)

    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "model.safetensors").write_bytes(WEIGHTS)
    expected = (dict.fromkeys(range(1, trials.STEPS + 1), 1.0), trials.digest(whole))
    monkeypatch.setattr(trials, "undisturbed", lambda layout, here: expected)
    monkeypatch.setitem(trials.LAUNCHERS, "plain", start)
    monkeypatch.setattr(trials, "forked", start)
    trial = trials.run_trial("plain", "DP2", 0, "end", tmp_path, random.Random(0))
    if is_whole:
        assert trial is None and len(started) == 1
    else:
        assert trial is not None and trial.equal and not trial.named and not trial.passed
