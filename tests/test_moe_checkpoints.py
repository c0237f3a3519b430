"""Checkpoints of a model with experts, biases and sinks: bitwise at the same layout, the same weights at another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.layouts import ONE_RANK, Layout, make_engine
from tests.ranks import run_ranks
from tests.test_train_engine import resumed, weights
from tests.tiny import TinyModels, save_tiny_model

pytestmark = pytest.mark.megatron

SPLIT_HEADS = Layout(tp=2, sp=True, etp=1)
SPLIT_EXPERTS = Layout(tp=2, sp=True, etp=2)
APART = Layout(tp=2, sp=True, ep=2, etp=1)


@pytest.mark.parametrize("fields", [{}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("layout", [ONE_RANK, SPLIT_HEADS, SPLIT_EXPERTS, APART, Layout(pp=2)], ids=str)
def test_a_resumed_engine_goes_on_bitwise(
    tiny_models: TinyModels, tmp_path: Path, layout: Layout, fields: dict[str, Any]
) -> None:
    path = tiny_models["gpt_oss"]
    assert all(run_ranks(layout.world, resumed, path, layout, str(tmp_path / "checkpoint"), fields))


def saved(path: str, layout: Layout, directory: str) -> dict[str, Tensor]:
    engine = make_engine(path, layout, trainable=False)
    engine.save(directory)
    return weights(engine)


def loaded(path: str, layout: Layout, directory: str) -> dict[str, Tensor]:
    engine = make_engine(path, layout, trainable=False)
    engine.load(directory)
    return weights(engine)


@pytest.mark.parametrize("layout", [SPLIT_HEADS, SPLIT_EXPERTS, APART], ids=str)
def test_weights_move_between_layouts(tiny_models: TinyModels, tmp_path: Path, layout: Layout) -> None:
    path, other = tiny_models["gpt_oss"], save_tiny_model("gpt_oss", tmp_path / "other", seed=1)
    wanted = run_ranks(layout.world, saved, path, layout, str(tmp_path / "checkpoint"))[0]
    (found,) = run_ranks(1, loaded, other, ONE_RANK, str(tmp_path / "checkpoint"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
