"""A training checkpoint read at another layout: masters and moments are the same tensors, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megalign.algos.supervised import sft_loss
from megalign.train_engine import TrainEngine
from tests.by_hand import random_batch
from tests.layouts import ONE_RANK, Layout, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels

pytestmark = pytest.mark.megatron

VOCABULARY = 101  # of tests.tiny's models: no TP divides it

DENSE = [
    (ONE_RANK, Layout(tp=2, sp=True)),
    (Layout(tp=2), Layout(pp=2)),
    (Layout(pp=2), Layout(dp=2)),
    (Layout(dp=2), Layout(pp=2, vpp=2)),
    (Layout(tp=2, pp=2), Layout(dp=2, cp=2)),
    (Layout(pp=2, first=1), Layout(tp=2, dp=2)),
]
WITH_EXPERTS = [
    (ONE_RANK, Layout(dp=2, ep=2)),
    (Layout(dp=2, ep=2), ONE_RANK),
    (Layout(tp=2, sp=True, etp=2), Layout(tp=2, sp=True, ep=2, etp=1)),
    (Layout(dp=2, ep=2, pp=2), Layout(tp=2, sp=True, etp=1)),
]


def _train(engine: TrainEngine, steps: range) -> list[tuple[float, float]]:
    """Steps of four sequences, dealt out to the replicas."""
    dp = engine.groups.dp
    mine = range(dp.rank, 4, dp.size)
    results = []
    for step in steps:
        batches = [random_batch(10 * step + number) for number in mine]
        results.append(engine.train_step(batches, sft_loss, learning_rate=1e-3))
    return [(result.loss, result.grad_norm) for result in results]


def _first(path: str, layout: Layout, directory: str, fields: dict[str, bool]) -> list[tuple[float, float]]:
    engine = make_engine(path, layout, **fields)
    _train(engine, range(3))
    engine.save(f"{directory}/first")
    return _train(engine, range(3, 6))


def _second(path: str, layout: Layout, directory: str, fields: dict[str, bool]) -> list[tuple[float, float]]:
    engine = make_engine(path, layout, **fields)
    engine.load(f"{directory}/first")
    engine.save(f"{directory}/second")
    return _train(engine, range(3, 6))


def _tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a torch_dist directory, whole, read by torch alone."""
    reader = torch_checkpoint.FileSystemReader(directory)
    kinds = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in kinds.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _compare(path: str, pair: tuple[Layout, Layout], directory: Path, fields: dict[str, bool]) -> None:
    before, after = pair
    expected = run_ranks(before.world, _first, path, before, str(directory), fields)[0]
    found = run_ranks(after.world, _second, path, after, str(directory), fields)[0]
    first, second = _tensors(directory / "first"), _tensors(directory / "second")
    assert first.keys() == second.keys()
    assert sum("exp_avg_sq" in name for name in first) > 5
    # Rows that pad the vocabulary for TP are nobody's.
    vocabulary = {name: slice(VOCABULARY) for name in first if "embedding" in name or "output_layer" in name}
    for name, tensor in first.items():
        rows = vocabulary.get(name, slice(None))
        assert torch.equal(tensor[rows], second[name][rows]), name
    if not fields:  # bf16 rounds otherwise at another layout
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def _name(pair: tuple[Layout, Layout]) -> str:
    return " to ".join(map(str, pair))


@pytest.mark.parametrize("pair", DENSE, ids=_name)
def test_a_dense_model(tiny_models: TinyModels, tmp_path: Path, pair: tuple[Layout, Layout]) -> None:
    _compare(tiny_models["llama"], pair, tmp_path, {})


@pytest.mark.parametrize("pair", WITH_EXPERTS, ids=_name)
def test_a_model_with_experts(tiny_models: TinyModels, tmp_path: Path, pair: tuple[Layout, Layout]) -> None:
    _compare(tiny_models["mixtral"], pair, tmp_path, {})


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_masters_of_a_bf16_model(tiny_models: TinyModels, tmp_path: Path, family: str) -> None:
    pair = (Layout(tp=2, sp=True, etp=1), Layout(dp=2, ep=2 if family == "mixtral" else 1))
    _compare(tiny_models[family], pair, tmp_path, {"bf16": True})
