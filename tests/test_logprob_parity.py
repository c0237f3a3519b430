"""Per-token logprobs of packed batches equal transformers', for every family, layout and packing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalign.batch import Batch
from megalign.parallel.groups import ParallelGroups
from tests.by_hand import packed, unpacked
from tests.layouts import EIGHT_RANKS, LAYOUTS, ONE_RANK, Layout, make_engine
from tests.ranks import run_ranks
from tests.tiny import CONFIGS, load_reference, save_tiny_model

pytestmark = pytest.mark.megatron

LENGTHS = [9, 1, 17, 4, 23, 6]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 101, (length,), generator=generator) for length in LENGTHS]


def temperatures() -> torch.Tensor:
    return torch.tensor([1.0, 0.7, 1.3, 1.0, 0.5, 2.0])


def batch(ids: list[int], groups: ParallelGroups) -> Batch:
    parts = [{"tokens": sequences()[i], "loss_mask": torch.arange(LENGTHS[i]) > 0} for i in ids]
    return packed(parts, groups, temperature=temperatures()[ids])


def engine_logprobs(path: str, layout: Layout, microbatches: list[list[int]]) -> dict[int, torch.Tensor]:
    engine = make_engine(path, layout, trainable=False)
    dp = engine.groups.dp
    mine = microbatches[dp.rank :: dp.size]
    batches = [batch(ids, engine.groups) for ids in mine]
    columns = engine.forward(batches, ("logprobs",))
    found: dict[int, torch.Tensor] = {}
    for ids, made, column in zip(mine, batches, columns, strict=True):
        found.update(zip(ids, unpacked(made, column["logprobs"], [LENGTHS[i] for i in ids]), strict=True))
    return found


@torch.no_grad()
def reference_logprobs(path: str) -> dict[int, torch.Tensor]:
    model = load_reference(path)
    wanted = {}
    for i, (tokens, temperature) in enumerate(zip(sequences(), temperatures(), strict=True)):
        log_p = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
        picked = log_p[:-1].gather(1, tokens[1:, None]).squeeze(1)
        wanted[i] = torch.cat([torch.zeros(1), picked])
    return wanted


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp(request.param)
    return save_tiny_model(request.param, path)


PACKINGS = [[[0, 1, 2], [3, 4, 5]], [[4], [5, 0], [2, 3, 1]], [[5, 4, 3, 2, 1, 0], [0]]]


def largest_difference(path: str, layout: Layout, microbatches: list[list[int]]) -> float:
    wanted = reference_logprobs(path)
    found: dict[int, torch.Tensor] = {}
    worst = 0.0
    for rank in run_ranks(layout.world, engine_logprobs, path, layout, microbatches):
        found.update(rank)
        worst = max([worst, *(float((rank[i] - wanted[i]).abs().max()) for i in rank)])
    assert sorted(found) == list(range(len(LENGTHS)))
    return worst


@pytest.mark.parametrize("layout", [ONE_RANK, *LAYOUTS], ids=str)
def test_logprobs_equal_transformers(model_path: str, layout: Layout) -> None:
    assert largest_difference(model_path, layout, PACKINGS[0]) < 1e-4


@pytest.mark.parametrize("microbatches", PACKINGS[1:])
def test_logprobs_do_not_depend_on_the_microbatch(model_path: str, microbatches: list[list[int]]) -> None:
    assert largest_difference(model_path, Layout(pp=2), microbatches) < 1e-4


@pytest.mark.ranks8
def test_logprobs_equal_transformers_on_eight_ranks(model_path: str) -> None:
    assert largest_difference(model_path, EIGHT_RANKS, PACKINGS[0]) < 1e-4
