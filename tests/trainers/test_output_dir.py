"""Places where a run cannot write, or must not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from megalign.config import SFTConfig
from megalign.errors import UserError
from megalign.trainers.sft import SFTTrainer
from tests.ranks import run_ranks
from tests.trainers.resume_runs import ROWS, saving_fields
from tests.trainers.runs import sft_fields


def _train_error(path: str, fields: dict[str, Any]) -> str:
    try:
        SFTTrainer(path, SFTConfig(**sft_fields(**fields)), train_dataset=ROWS).train()
    except UserError as error:
        return str(error)
    return "no error"


def test_a_place_where_nothing_can_be_written_is_one_sentence(model: str, tmp_path: Path) -> None:
    def told(directory: Path, **fields: Any) -> str:
        return run_ranks(1, _train_error, model, saving_fields(directory, max_steps=1, **fields))[0]

    assert "'/proc' cannot be written to (" in told(Path("/proc"))
    (tmp_path / "metrics.jsonl").mkdir()
    assert "metrics.jsonl is a directory" in told(tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "checkpoint-1").write_text("")
    assert re.search("cannot write the checkpoint .*checkpoint-1 .*Not a directory", told(tmp_path, save_steps=1))


def test_the_model_is_not_written_over_itself(model: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shutil.copytree(model, tmp_path / "model"))
    (error,) = run_ranks(1, _train_error, str(tmp_path / "model"), saving_fields(tmp_path / "link"))
    assert "is also the directory of model, which the trained model would overwrite; choose another" in error
