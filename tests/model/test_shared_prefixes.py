"""Prompts computed once give the columns and gradients of prompts computed in every sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalign.batch import Batch, Metric
from megalign.data.collate import pack
from megalign.data.prefixes import SHORTEST, common_beginnings, num_shared, shared_prefixes
from megalign.parallel import pipeline
from megalign.parallel.groups import ParallelGroups
from tests.by_hand import worst
from tests.layouts import ONE_RANK, Layout, gradients_of, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels

# (prompt, its completions' lengths, how many tokens the first two completions share): the second prompt is too short
# to be shared, and the third is longer than the models' windows and stands before completions of one token.
GROUPS = [(20, [7, 5, 1], 3), (5, [6, 4], 0), (40, [1, 1, 9], 0), (17, [12], 0)]
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "mistral", "qwen3_moe", "phi3", "deepseek_v3"]
NOT_SHARED = {"phi3", "deepseek_v3"}  # LongRoPE, latent attention
LAYOUTS = [Layout(tp=2, sp=True), Layout(pp=2, vpp=2), Layout(tp=2, pp=2), Layout(cp=2)]


def sequences() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)

    def some(length: int) -> list[int]:
        return torch.randint(3, 101, (length,), generator=generator).tolist()

    made = []
    for prompt_length, completions, shared in GROUPS:
        prompt, begin = some(prompt_length), some(shared)
        for number, length in enumerate(completions):
            tokens = prompt + (begin + some(length - shared) if number < 2 else some(length))
            mask = [False] * prompt_length + [True] * length
            made.append({"tokens": tokens, "loss_mask": mask, "temperature": 0.5 + 0.1 * len(made)})
    return made


def microbatches(groups: ParallelGroups) -> list[Batch]:
    sizes = {"multiple": groups.token_multiple, "sequence_multiple": groups.sequence_multiple}
    return [pack(sequences()[:5], **sizes), pack(sequences()[5:], **sizes)]


def weighted(columns: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
    """Every loss token with a weight of its own."""
    places = torch.arange(batch.num_tokens) - batch.cu_seqlens[batch.sequence_ids]  # pads may stand between sequences
    weights = torch.sin(7.0 * batch.sequence_ids + places + batch.tokens)
    return (columns["logprobs"] * weights + 0.1 * columns["entropy"] * weights).sum(), {}


def computed(path: str, layout: Layout, fields: dict[str, Any]) -> dict[str, Any]:
    """On a rank: columns, gradients, and how many tokens the layers saw."""
    engine = make_engine(path, layout, use_distributed_optimizer=False, **fields)
    batches = microbatches(engine.groups)
    columns = engine.forward(batches, ("logprobs", "entropy", "argmax_correct"))
    seen = [found and len(found.kept) for found in map(engine._prefixes, batches)]
    placed = engine._placed(batches)
    pipeline.train(engine._chunks, placed, engine._stage, engine._rows, engine._head, weighted, engine.groups)
    return {"columns": columns, "seen": seen, "gradients": gradients_of(engine)}


def check(path: str, layout: Layout, *, shares: bool) -> None:
    alone = run_ranks(1, computed, path, ONE_RANK, {"share_prefixes": False})[0]
    assert alone["seen"] == [None, None]
    for rank in run_ranks(layout.world, computed, path, layout, {}):
        assert all(seen is not None for seen in rank["seen"]) == shares
        if shares:
            assert sum(rank["seen"]) < 0.7 * sum(len(sequence["tokens"]) for sequence in sequences())
            for mine, wanted in zip(rank["columns"], alone["columns"], strict=True):
                for name in wanted:  # T may differ by the tail
                    size = min(len(mine[name]), len(wanted[name]))
                    torch.testing.assert_close(mine[name][:size], wanted[name][:size], rtol=1e-5, atol=1e-5)
        difference, name = worst(rank["gradients"], alone["gradients"])
        assert difference < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(tiny_models: TinyModels, family: str) -> None:
    check(tiny_models[family], ONE_RANK, shares=family not in NOT_SHARED)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_computes_the_same(tiny_models: TinyModels, layout: Layout) -> None:
    check(tiny_models["llama"], layout, shares=layout.cp == 1)


def scores(path: str, fields: dict[str, Any]) -> list[dict[str, Tensor]]:
    """On a rank: a critic's columns."""
    engine = make_engine(path, ONE_RANK, trainable=False, score_head=True, **fields)
    return engine.forward(microbatches(engine.groups), ("scores", "values"))


def test_a_score_head_computes_the_same(tiny_models: TinyModels) -> None:
    path = tiny_models["llama"]
    mine, wanted = (run_ranks(1, scores, path, {"share_prefixes": shares})[0] for shares in (True, False))
    for found, other in zip(mine, wanted, strict=True):
        for name in ("scores", "values"):
            torch.testing.assert_close(found[name], other[name], rtol=1e-5, atol=1e-5)


def test_the_routers_balance_counts_every_token(tiny_models: TinyModels) -> None:
    found = run_ranks(1, computed, tiny_models["qwen3_moe"], ONE_RANK, {"router_aux_loss_coef": 0.01})[0]
    assert found["seen"] == [None, None]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), multiple=st.sampled_from([1, 2, 4, 16]))
def test_every_token_is_found_where_it_was_computed(data: st.DataObject, multiple: int) -> None:
    """A token's source has the same token and the same tokens before it."""
    stems = [data.draw(st.lists(st.integers(0, 2), min_size=SHORTEST, max_size=50)) for _ in range(2)]
    parts = [
        data.draw(st.sampled_from(stems))[: data.draw(st.integers(1, 50))] + data.draw(st.lists(st.integers(0, 2)))
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    tokens, lengths = torch.tensor([token for part in parts for token in part]), [len(part) for part in parts]
    shared = common_beginnings(tokens, lengths)
    found, spared = shared_prefixes(shared, lengths, multiple), num_shared(shared, multiple)
    assert spared % multiple == 0
    if found is None:
        assert spared == 0
        return
    assert len(tokens) - len(found.kept) == spared
    assert len(found.kept) == sum(found.queries) and min(found.queries) >= 1
    where = [(part, end) for part, length in enumerate(lengths) for end in range(length)]
    for place, source in enumerate(found.source.tolist()):
        (part, end), (other, other_end) = where[place], where[int(found.kept[source])]
        assert parts[part][: end + 1] == parts[other][: other_end + 1]


def test_short_beginnings_are_not_shared() -> None:
    tokens = torch.tensor(
        [*range(SHORTEST - 1), 50, *range(SHORTEST - 1), 51, *range(SHORTEST), 52, *range(SHORTEST), 53]
    )
    lengths = [SHORTEST, SHORTEST, SHORTEST + 1, SHORTEST + 1]
    assert common_beginnings(tokens, lengths) == (0, 0, 0, SHORTEST)
