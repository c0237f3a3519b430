"""The plan of who gives which piece, from what ranks say they hold; no ranks needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megalign.conversion.architecture import Architecture
from megalign.conversion.families import rules_of
from megalign.conversion.names import Key
from megalign.conversion.rules import expand
from megalign.errors import UserError
from megalign.resharding.export import split_into_buckets
from megalign.resharding.layout import Holder, Plan, make_plan

ARCHITECTURE = Architecture(
    family="qwen3",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=11,
    max_position_embeddings=16,
    norm_epsilon=1e-6,
    rotary_base=1e4,
    tied_embeddings=True,
)


def holders(tp_size: int, stages: list[Callable[[Key], bool]]) -> list[Holder]:
    """Ranks in Megatron's order, tp fastest; `stages[i](key)` says what stage i holds."""
    keys = [key for _, key in expand(rules_of(ARCHITECTURE), ARCHITECTURE)]
    return [
        Holder(tp, tp, {key: torch.float32 for key in keys if holds(key)}) for holds in stages for tp in range(tp_size)
    ]


def first_stage(key: Key) -> bool:
    """Embedding and three of four layers."""
    return key.pattern.startswith("embedding") or (key.indices != () and key.indices[0] < 3)


def last_stage(key: Key) -> bool:
    """The rest, and the tied copy of the embedding."""
    return not first_stage(key)


def covered(plan: Plan, name: str) -> torch.Tensor:
    """How often each element of a tensor is given."""
    count = torch.zeros(plan.shapes[name], dtype=torch.int64)
    for owned in plan.tensors[name]:
        count[owned.piece.hf_index] += 1
    return count


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_element_is_given_once_by_a_rank_that_has_it(tp_size: int) -> None:
    ranks = holders(tp_size, [first_stage, last_stage])
    plan = make_plan(ranks, ARCHITECTURE)
    for name, owned in plan.tensors.items():
        assert (covered(plan, name) == 1).all(), name
        assert all(item.key in ranks[item.owner].dtypes for item in owned), name


def test_the_tied_copy_gives_nothing_and_replicas_give_once() -> None:
    plan = make_plan(holders(2, [first_stage, last_stage]), ARCHITECTURE)
    assert "lm_head.weight" not in plan.tensors
    assert {owned.owner for owned in plan.tensors["model.embed_tokens.weight"]} == {0, 1}
    assert [owned.owner for owned in plan.tensors["model.norm.weight"]] == [2]
    assert [owned.owner for owned in plan.tensors["model.layers.3.self_attn.q_norm.weight"]] == [2]


def test_a_model_that_no_rank_holds_whole_is_refused_by_name() -> None:
    def nothing_of_layer_3(key: Key) -> bool:
        return last_stage(key) and key.indices != (3,)

    with pytest.raises(UserError, match=r"decoder\.layers\.3\.self_attention\.linear_qkv\.weight"):
        make_plan(holders(1, [first_stage, nothing_of_layer_3]), ARCHITECTURE)


def test_buckets_keep_the_order_and_the_limit() -> None:
    plan = make_plan(holders(2, [first_stage, last_stage]), ARCHITECTURE)
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in plan.shapes.items()}
    buckets = split_into_buckets(plan, 800)
    assert [name for bucket in buckets for name in bucket] == list(plan.tensors)
    assert all(sum(sizes[name] for name in bucket) <= 800 or len(bucket) == 1 for bucket in buckets)
    assert max(sizes.values()) > 700 and 5 < len(buckets) < len(sizes)
    assert len(split_into_buckets(plan, 1)) == len(sizes)
    assert len(split_into_buckets(plan, 1 << 30)) == 1
