"""tools/compare_with_trl.py: whole runs of five trainers are TRL's, step by step, and a run that is not is told."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from tests.jobs.start import ROOT, run
from tools.compare_with_trl import Compared, beyond, compare, make_rows

TOOL = (sys.executable, "tools/compare_with_trl.py")
STEPS = 10
# What TRL's documentation promises of each; the comparison takes whatever else TRL logs with it.
METRICS = {
    "sft": {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"},
    "reward": {"loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"},
    "dpo": {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"},
    "kto": {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl"},
    "orpo": {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "nll_loss", "log_odds_ratio"},
}
# A mistake such as the comparison is there to find: another beta on one side.
MISTAKEN = """
import sys
sys.path.insert(0, "tools")
import compare_with_trl as tool
right = tool.megalign_trainer
tool.megalign_trainer = lambda algorithm, fields, rows, paths: right(algorithm, {**fields, "beta": 0.11}, rows, paths)
tool.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["messages", "text"])
def test_ten_steps_of_each_are_trls(rows: str, tmp_path: Path) -> None:
    file = tmp_path / "compared.json"
    ran = run([*TOOL, "--rows", rows, "--json", str(file)], cwd=ROOT)
    ran.succeeded()
    found = [Compared(**one) for one in json.loads(file.read_text())]
    for algorithm, names in METRICS.items():
        for step in range(1, STEPS + 1):
            own = {one.metric: one for one in found if (one.algorithm, one.step) == (algorithm, step)}
            assert names <= own.keys()
            for name, one in own.items():
                assert abs(one.trl - one.megalign) <= 1e-3, (algorithm, step, name, one)
        losses = [one.trl for one in found if (one.algorithm, one.metric) == (algorithm, "loss")]
        assert len(set(losses)) == STEPS and losses[-1] < losses[0], f"{algorithm}: nothing was learned: {losses}"


# What TRL pads with where a tokenizer has no pad: transformers then takes the score of the token before the end.
PADS_WITH_ENDS = """
import sys
sys.path.insert(0, "tools")
import compare_with_trl as tool
made = tool.make_tokenizer
def padded():
    tokenizer = made()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
tool.make_tokenizer = padded
tool.main()
"""


@pytest.mark.slow
def test_a_reward_model_is_trls_where_the_end_token_is_the_pad(tmp_path: Path) -> None:
    file = tmp_path / "compared.json"
    arguments = ["--algorithms", "reward", "--rows", "text", "--steps", "3", "--json", str(file)]
    run([sys.executable, "-c", PADS_WITH_ENDS, *arguments], cwd=ROOT).succeeded()
    found = [Compared(**one) for one in json.loads(file.read_text())]
    assert METRICS["reward"] <= {one.metric for one in found} and not beyond(found, 1e-4)


@pytest.mark.slow
def test_a_run_that_is_not_trls_ends_with_status_1(tmp_path: Path) -> None:
    file = tmp_path / "compared.json"
    arguments = ["--algorithms", "dpo", "--steps", "2", "--json", str(file)]
    ran = run([sys.executable, "-c", MISTAKEN, *arguments], cwd=ROOT)
    assert ran.status == 1
    (line,) = ran.error_lines
    assert "numbers differ by more than 0.001" in line
    wrong = beyond([Compared(**one) for one in json.loads(file.read_text())], 1e-3)
    assert {"loss", "rewards/margins"} <= {one.metric for one in wrong}


def test_what_is_not_a_number_differs() -> None:
    lines = [{"loss": 1.0, "kl": math.nan}], [{"loss": 1.0005, "kl": 0.0, "ours": 3.0}]
    found = compare("kto", *lines)
    assert [(one.metric, one.step) for one in found] == [("loss", 1), ("kl", 1)]
    assert [one.metric for one in beyond(found, 1e-3)] == ["kl"]


def test_a_metric_that_only_trl_logs_ends_the_comparison() -> None:
    with pytest.raises(SystemExit, match="only TRL logs kl in step 1"):
        compare("kto", [{"loss": 1.0, "kl": 0.0}], [{"loss": 1.0}])
    with pytest.raises(ValueError, match="shorter"):
        compare("kto", [{"loss": 1.0}], [])


def test_every_step_of_kto_has_both_kinds_of_answers() -> None:
    rows = make_rows("kto", "text", 40)
    assert rows == make_rows("kto", "text", 40)
    assert all({row["label"] for row in rows[at : at + 4]} == {True, False} for at in range(0, 40, 4))
