"""overlap_grad_reduce and overlap_param_gather change no weight, and nothing reads a weight before it has come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalign.algos.supervised import sft_loss
from megalign.train_engine import TrainEngine
from tests.by_hand import random_batch
from tests.layouts import Layout, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels

pytestmark = pytest.mark.megatron

LAYOUTS = [Layout(dp=2), Layout(pp=2, dp=2), Layout(tp=2, dp=2, sp=True), Layout(pp=2, dp=2, vpp=2)]
OVERLAPS = [{"overlap_grad_reduce": True}, {"overlap_grad_reduce": True, "overlap_param_gather": True}]
FAMILIES = ["llama", "qwen2"]  # with tied and untied embeddings


def steps(engine: TrainEngine, numbers: range) -> None:
    rank = engine.groups.dp.rank
    for number in numbers:
        microbatches = [random_batch(100 * number + 10 * i + rank) for i in range(2)]
        engine.train_step(microbatches, sft_loss, learning_rate=1e-2)


def whole(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.gathered()}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit by bit."""
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


def compared(paths: list[str], layout: Layout, overlaps: list[dict[str, bool]]) -> list[Any]:
    """What differs between an engine that overlaps and one that does not, at every way of reading weights."""
    wrong = []
    for path in paths:
        plain = make_engine(path, layout)
        engines = [make_engine(path, layout, **fields) for fields in overlaps]
        rank = plain.groups.dp.rank
        for number in range(3):
            for engine in (plain, *engines):
                steps(engine, range(number, number + 1))
            wanted = whole(plain)
            for fields, engine in zip(overlaps, engines, strict=True):
                if number == 1:  # a forward pass without gradient is then the first to read the new weights
                    found, expected = (e.forward([random_batch(7 + rank)])[0]["logprobs"] for e in (engine, plain))
                    if not torch.equal(found, expected):
                        wrong.append((path, fields, number, "logprobs"))
                if names := differing(whole(engine), wanted):
                    wrong.append((path, fields, number, names))
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_three_steps_and_every_weight_in_between_are_those_without_overlap(
    layout: Layout, tiny_models: TinyModels
) -> None:
    paths = [tiny_models[family] for family in FAMILIES]
    for wrong in run_ranks(layout.world, compared, paths, layout, OVERLAPS):
        assert not wrong


def read_at_once(path: str, layout: Layout, directory: str) -> dict[str, bool]:
    """Each first read after a step, by a fresh reader."""
    fields = OVERLAPS[1]
    plain, engine = make_engine(path, layout), make_engine(path, layout, **fields)
    results = {}
    for engine_ in (plain, engine):
        steps(engine_, range(1))
    engine.save(directory)
    restored = make_engine(path, layout, **fields)
    restored.load(directory)
    results["save and load"] = not differing(whole(restored), whole(plain))

    for engine_ in (plain, engine):
        steps(engine_, range(1, 2))
    frozen, other = (make_engine(path, layout, trainable=False) for _ in range(2))
    frozen.mix_in(engine, 0.5)
    other.mix_in(plain, 0.5)
    results["mix_in"] = not differing(whole(frozen), whole(other))

    for engine_ in (plain, engine):
        steps(engine_, range(2, 3))
    slices = {item.hf_name: item.tensor.clone() for item in engine.named_slices()}
    expected = {item.hf_name: item.tensor for item in plain.named_slices()}
    results["named_slices"] = not differing(slices, expected)

    for engine_ in (plain, engine):
        steps(engine_, range(3, 4))
    engine._sleeps = True
    engine.sleep()
    engine.wake()
    results["sleep"] = not differing(whole(engine), whole(plain))
    return results


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(pp=2, dp=2)], ids=str)
def test_whatever_reads_weights_after_a_step_sees_the_new_ones(
    layout: Layout, tiny_models: TinyModels, tmp_path: Path
) -> None:
    for results in run_ranks(layout.world, read_at_once, tiny_models["llama"], layout, str(tmp_path / "checkpoint")):
        assert all(results.values()), results
