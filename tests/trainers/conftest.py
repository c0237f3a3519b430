"""What several files of trainers' tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import TinyModels
from tests.trainers.resume_runs import ROWS, saving_fields
from tests.trainers.runs import train_sft


@pytest.fixture(scope="session")
def model(tiny_models: TinyModels) -> str:
    """A llama; nothing may change it."""
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def made(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of three steps has left; nothing may change it."""
    directory = tmp_path_factory.mktemp("made")
    run_ranks(1, train_sft, tiny_models["llama"], ROWS, saving_fields(directory, max_steps=3))
    return directory
