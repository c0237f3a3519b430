"""Which Megatron-Core runs, what a user hears of it, and what its saves leave behind."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from tests.jobs.start import run, torchrun
from tests.layouts import ONE_RANK, make_engine
from tests.megatron_version import wanted_version
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.megatron

# A rank's imports, and one word of Megatron's that nobody has met yet.
IMPORTS = """
import warnings
import megalign.trainers.sft
warnings.warn_explicit("something new", UserWarning, "megatron/core/new.py", 7, module="megatron.core.new")
"""
# Everything that an engine does with Megatron, and one line of its logs that nobody has met yet.
LIFE = """
import logging, sys
from tests.layouts import Layout
from tests.test_train_engine import resumed
resumed(sys.argv[1], Layout(dp=2), sys.argv[2], {})
logging.getLogger("megatron.core.models.gpt.gpt_model").warning("something new")
"""


def imported_version() -> str:
    import megatron.core

    return megatron.core.__shortversion__


def test_the_version_that_was_asked_for_runs_here_in_ranks_and_in_jobs(tmp_path: Path) -> None:
    code = "import megatron.core; print(megatron.core.__shortversion__)"
    job = run([sys.executable, "-c", code], tmp_path).succeeded()
    assert [imported_version(), *run_ranks(1, imported_version), job.stdout.strip()] == [wanted_version()] * 3


def test_known_warnings_are_silent_and_others_are_shown(tmp_path: Path) -> None:
    told = run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", IMPORTS], tmp_path).succeeded().stderr
    assert [line for line in told.splitlines() if "Warning" in line] == [
        "megatron/core/new.py:7: UserWarning: something new"
    ]


def test_training_saving_and_loading_say_nothing_but_what_is_new(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    (tmp_path / "life.py").write_text(LIFE)
    told = run(torchrun(2, "life.py", model, "checkpoint"), tmp_path).succeeded().stderr
    assert told.splitlines() == ["something new"] * 2


def children_after_a_save(path: str, directory: str) -> list[str]:
    make_engine(path, ONE_RANK, trainable=False).save(directory)
    return [child.name() for child in psutil.Process().children()]


def test_a_save_leaves_no_process_behind(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    assert run_ranks(1, children_after_a_save, model, str(tmp_path / "checkpoint")) == [[]]
