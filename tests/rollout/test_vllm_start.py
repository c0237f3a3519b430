"""What is refused before vLLM starts, and that nobody pays for its import who does not sample."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from megalign.config import GRPOConfig
from megalign.errors import UserError
from megalign.parallel.groups import Axis, ParallelGroups
from megalign.rollout import vllm_engine


def two_ranks() -> ParallelGroups:
    world, alone = Axis(group=None, rank=0, size=2, ranks=[0, 1]), Axis(group=None, rank=0, size=1, ranks=[0])
    return ParallelGroups(world=world, tp=world, pp=alone, cp=alone, dp=alone, mp=world)


def test_vllm_is_imported_by_the_engine_only() -> None:
    code = "import sys, megalign.rollout.vllm_engine, megalign.patches.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_vllm_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"^vLLM is not installed: .*tools/install\.sh"):
        vllm_engine._import_vllm()


@pytest.mark.parametrize("name", ["repetition_detection", "trace_decode_token_ids"])
def test_what_a_completion_has_no_word_for_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"generation_kwargs\['{name}'\] is refused"):
        vllm_engine._check_names([name], SimpleNamespace(SamplingParams=SimpleNamespace(__struct_fields__=[name])))


def test_a_missing_model_is_named() -> None:
    with pytest.raises(UserError, match="'absent' does not exist"):
        vllm_engine.VllmEngine("absent", GRPOConfig(), two_ranks())
