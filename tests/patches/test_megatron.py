"""Which of Megatron's warnings a user sees: none of those that are known, all others."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.jobs.start import run

# A rank's imports, and one word of Megatron's that nobody has met yet.
CODE = """
import warnings
import megalign.trainers.sft
warnings.warn_explicit("something new", UserWarning, "megatron/core/new.py", 7, module="megatron.core.new")
"""


def test_known_warnings_are_silent_and_others_are_shown(tmp_path: Path) -> None:
    told = run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", CODE], tmp_path).succeeded().stderr
    assert [line for line in told.splitlines() if "Warning" in line] == [
        "megatron/core/new.py:7: UserWarning: something new"
    ]
