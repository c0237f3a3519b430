"""Packed batches by hand, and properties of every packing."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalign.batch import Batch, Completion
from megalign.data.balance import Budget
from megalign.data.collate import completion_sequences, pack, packed_share, unpack
from megalign.data.prefixes import num_shared
from megalign.parallel.groups import Axis


def completion(index: int, prompt: list[int], ids: list[int], **fields: object) -> Completion:
    defaults = {"logprobs": [-0.5 * token for token in ids], "finish_reason": "stop", "policy_version": 0}
    return Completion(index=index, prompt_ids=prompt, completion_ids=ids, **{**defaults, **fields})


def test_sequences_stand_one_after_the_other_with_a_dummy_tail() -> None:
    batch = pack(
        [
            {"tokens": [1, 2, 3], "loss_mask": [True, True, False], "weights": [0.1, 0.2, 0.3], "reward": 1},
            {"tokens": [4, 5], "weights": [0.4, 0.5], "reward": 2.5},
        ],
        multiple=4,
    )
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0] and batch.tokens.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8] and batch.cu_seqlens.dtype == torch.int32
    assert batch.num_sequences == 2 and batch.lengths.tolist() == [3, 2]
    # the first token of a sequence has nothing before it to be predicted from
    assert batch["loss_mask"].tolist() == [False, True, False, False, True, False, False, False]
    torch.testing.assert_close(batch["weights"], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0, 0, 0]))
    assert batch["reward"].tolist() == [1.0, 2.5]


def test_a_batch_that_is_full_has_no_tail() -> None:
    batch = pack([{"tokens": [1, 2]}, {"tokens": [3, 4]}], multiple=4)
    assert batch.cu_seqlens.tolist() == [0, 2, 4]


def test_each_sequence_is_padded_inside_itself() -> None:
    batch = pack(
        [{"tokens": [1, 2, 3], "x": [7.0, 8, 9]}, {"tokens": [4], "x": [1.0]}],
        multiple=8,
        sequence_multiple=4,
    )
    assert batch.tokens.tolist() == [1, 2, 3, 0, 4, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch["loss_mask"].tolist() == [False, True, True] + 5 * [False]
    assert batch["x"].tolist() == [7, 8, 9, 0, 1, 0, 0, 0]


def test_lengths_are_known_without_asking_the_device() -> None:
    batch = pack([{"tokens": [1, 2, 3]}, {"tokens": [4]}], multiple=12, sequence_multiple=4).to(torch.device("meta"))
    assert batch.host_lengths == ((4, 4, 4), (3, 1, 4))
    assert pack([{"tokens": [1]}, {"tokens": [2]}]).host_lengths == ((1, 1), (1, 1))


def test_no_sequences_make_a_dummy_batch() -> None:
    batch = pack([], multiple=6)
    assert batch.num_sequences == 0 and batch.num_tokens == 6 and not batch["loss_mask"].any()


def test_columns_shorter_than_their_tokens_are_caught() -> None:
    with pytest.raises(AssertionError, match="x: 1 values for 2 tokens"):
        pack([{"tokens": [1, 2], "x": [1.0]}])
    with pytest.raises(AssertionError, match="loss_mask: 3 values"):
        pack([{"tokens": [1, 2], "loss_mask": [True] * 3}])


def test_an_unpacked_batch_packs_into_the_same_one_and_into_that_of_another_layout() -> None:
    draw = torch.Generator().manual_seed(0)
    sequences = [
        {
            "tokens": torch.randint(3, 50, (length,), generator=draw),
            "loss_mask": [True] * length,
            "old_logprobs": torch.randn(length, generator=draw),
            "temperature": 0.5 + number,
        }
        for number, length in enumerate([3, 8, 1])
    ]
    plain, zigzag = ({"multiple": 4}, {"multiple": 8, "sequence_multiple": 4})
    batch = pack(sequences, **plain)
    assert _same(pack(unpack(batch), **plain), batch)
    assert _same(pack(unpack(batch), **zigzag), pack(sequences, **zigzag))
    assert _same(pack(unpack(pack(sequences, **zigzag)), **plain), batch)
    assert unpack(pack([], multiple=4)) == []


def _same(first: Batch, second: Batch) -> bool:
    names = [*first.token_columns, *first.sequence_columns]
    assert names == [*second.token_columns, *second.sequence_columns]
    pairs = [(first.tokens, second.tokens), (first.cu_seqlens, second.cu_seqlens)]
    pairs += [(first[name], second[name]) for name in names]
    return all(torch.equal(one, other) for one, other in pairs) and first.num_sequences == second.num_sequences


def test_completions_are_trained_on_and_prompts_are_not() -> None:
    completions = [
        completion(0, [9, 8], [1, 2, 3], completion_mask=[True, False, True]),
        completion(1, [7], [4, 5], finish_reason="length", logprobs=[math.nan, -2.0]),
    ]
    sequences = completion_sequences(completions, mask_truncated_completions=False, temperature=0.7)
    batch = pack(sequences, multiple=5)
    assert batch.tokens.tolist() == [9, 8, 1, 2, 3, 7, 4, 5, 0, 0]
    assert batch["loss_mask"].int().tolist() == [0, 0, 1, 0, 1, 0, 1, 1, 0, 0]
    expected = torch.tensor([0, 0, -0.5, -1, -1.5, 0, math.nan, -2, 0, 0])
    torch.testing.assert_close(batch["rollout_logprobs"], expected, equal_nan=True)
    assert batch["index"].tolist() == [0, 1] and batch["ended"].tolist() == [1, 0]
    torch.testing.assert_close(batch["temperature"], torch.tensor([0.7, 0.7]))


@pytest.mark.parametrize(("masks", "expected"), [(True, [0, 0, 0]), (False, [0, 1, 1])])
def test_truncated_completions_can_be_masked_and_stay_sequences(masks: bool, expected: list[int]) -> None:
    cut = completion(0, [7], [4, 5], finish_reason="length")
    batch = pack(completion_sequences([cut], mask_truncated_completions=masks))
    assert batch["loss_mask"].int().tolist() == expected and batch.num_sequences == 1
    assert "temperature" not in batch


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    sequence_multiple=st.integers(1, 4),
    factor=st.integers(1, 3),
)
def test_every_packing_keeps_tokens_and_multiples(lengths: list[int], sequence_multiple: int, factor: int) -> None:
    multiple = sequence_multiple * factor
    sequences = [{"tokens": [10 * row + 1] * length} for row, length in enumerate(lengths)]
    batch = pack(sequences, multiple=multiple, sequence_multiple=sequence_multiple)
    assert batch.num_tokens % multiple == 0 and batch.num_tokens == batch.cu_seqlens[-1]
    assert (batch.cu_seqlens % sequence_multiple == 0).all()
    assert len(batch.cu_seqlens) - 1 - batch.num_sequences in (0, 1)
    assert batch["loss_mask"].sum() == sum(lengths) - len(lengths)
    for row, start in enumerate(batch.cu_seqlens[: batch.num_sequences].tolist()):
        assert batch.tokens[start : start + lengths[row]].eq(10 * row + 1).all()


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize(("multiple", "sequence_multiple"), [(1, 1), (4, 4), (8, 4)])
def test_no_microbatch_has_more_tokens_than_the_budget(shares: bool, multiple: int, sequence_multiple: int) -> None:
    """What is computed: beginnings in common once where they are shared, pads always."""
    groups = SimpleNamespace(
        dp=Axis(None, 0, 1, [0]), token_multiple=multiple, sequence_multiple=1 if shares else sequence_multiple
    )
    sizes = {"micro_batch": 1, "budget": Budget(tokens=50, cost=float, shares_prefixes=shares)}
    draw = random.Random(0)
    for _ in range(30):
        prompt = list(range(draw.randint(16, 24)))
        rows = [{"tokens": prompt + [100 + n] * draw.randint(1, 8)} for n in range(12)]
        share = packed_share(range(12), lambda part, rows=rows: [rows[row] for row in part], groups, **sizes)
        assert sorted(row for part, _ in share.microbatches for row in part) == list(range(12))
        assert shares is False or len(share.microbatches) < 12
        for _, batch in share.microbatches:
            assert len(batch.tokens) - (num_shared(batch.shared, multiple) if shares else 0) <= 50
