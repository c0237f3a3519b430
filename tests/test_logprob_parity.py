"""Per-token logprobs of packed batches equal transformers', for every family, layout and packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalign.batch import Batch
from megalign.parallel.groups import ParallelGroups
from tests.layouts import EIGHT_RANKS, LAYOUTS, ONE_RANK, Layout, make_engine
from tests.ranks import run_ranks
from tests.tiny import CONFIGS, load_reference, save_tiny_model

LENGTHS = [9, 1, 17, 4, 23, 6]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 101, (length,), generator=generator) for length in LENGTHS]


def temperatures() -> torch.Tensor:
    return torch.tensor([1.0, 0.7, 1.3, 1.0, 0.5, 2.0])


def pack(ids: list[int], groups: ParallelGroups) -> Batch:
    """By hand, so that this test does not lean on the collator it should check."""
    parts = [padded(sequences()[i], groups.sequence_multiple) for i in ids]
    total = sum(len(part) for part in parts)
    tail = -total % groups.token_multiple
    lengths = [len(part) for part in parts] + ([tail] if tail else [])
    real = [
        (torch.arange(len(part)) > 0) & (torch.arange(len(part)) < LENGTHS[i])
        for i, part in zip(ids, parts, strict=True)
    ]
    mask = torch.cat([*real, torch.zeros(tail, dtype=torch.bool)])
    return Batch(
        tokens=torch.cat([*parts, torch.zeros(tail, dtype=torch.int64)]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        num_sequences=len(ids),
        token_columns={"loss_mask": mask},
        sequence_columns={"temperature": temperatures()[ids]},
    )


def padded(part: torch.Tensor, multiple: int) -> torch.Tensor:
    """With tokens behind it that nothing may depend on."""
    return torch.cat([part, torch.full((-len(part) % multiple,), 7)])


def split(batch: Batch, column: torch.Tensor, ids: list[int]) -> dict[int, torch.Tensor]:
    pieces = column.split(batch.cu_seqlens.diff().tolist())
    return {i: piece[: LENGTHS[i]] for i, piece in zip(ids, pieces, strict=False)}


def engine_logprobs(path: str, layout: Layout, microbatches: list[list[int]]) -> dict[int, torch.Tensor]:
    engine = make_engine(path, layout, trainable=False)
    dp = engine.groups.dp
    mine = microbatches[dp.rank :: dp.size]
    batches = [pack(ids, engine.groups) for ids in mine]
    columns = engine.forward(batches, ("logprobs",))
    found: dict[int, torch.Tensor] = {}
    for ids, batch, column in zip(mine, batches, columns, strict=True):
        found.update(split(batch, column["logprobs"], ids))
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


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                           "original_max_position_embeddings": 32}}),
    "some-windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 6,
                               "layer_types": ["full_attention", "sliding_attention"] * 2}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "no-bias": ("glm4", {"attention_bias": False}),
    "no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
}  # fmt: skip


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, cp=2)], ids=str)
def test_logprobs_of_what_a_config_may_change_equal_transformers(tmp_path: Path, variant: str, layout: Layout) -> None:
    family, changes = VARIANTS[variant]
    assert largest_difference(save_tiny_model(family, tmp_path, **changes), layout, PACKINGS[0]) < 1e-4


@pytest.mark.parametrize("microbatches", PACKINGS[1:])
def test_logprobs_do_not_depend_on_the_microbatch(model_path: str, microbatches: list[list[int]]) -> None:
    assert largest_difference(model_path, Layout(pp=2), microbatches) < 1e-4


@pytest.mark.ranks8
def test_logprobs_equal_transformers_on_eight_ranks(model_path: str) -> None:
    assert largest_difference(model_path, EIGHT_RANKS, PACKINGS[0]) < 1e-4
