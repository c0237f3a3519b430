"""Global batches against Hugging Face's and TRL's samplers; shards of them by property."""

from __future__ import annotations

import itertools

import pytest
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from megalign.data.sampler import EpochSampler, shard
from megalign.errors import UserError


def batches(sampler: EpochSampler, count: int) -> list[list[int]]:
    return list(itertools.islice(sampler, count))


def test_without_shuffling_rows_come_in_order_and_the_last_batch_is_smaller() -> None:
    sampler = EpochSampler(7, 3, seed=0, shuffle=False)
    assert batches(sampler, 4) == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]
    assert sampler.batches_per_epoch == 3 and sampler.epoch == 1


def test_each_epochs_order_is_that_of_hugging_faces_trainer() -> None:
    theirs = SeedableRandomSampler(list(range(11)), data_seed=5)
    sampler = EpochSampler(11, 4, seed=5, shuffle=True)
    for _ in range(3):
        ours = [row for batch in batches(sampler, 3) for row in batch]
        assert ours == list(theirs)
        assert sorted(ours) == list(range(11)) != ours


def test_prompts_of_generation_batches_are_trls() -> None:
    theirs = list(RepeatSampler(list(range(7)), mini_repeat_count=2, batch_size=3, seed=5))
    sampler = EpochSampler(7, 3, seed=5, shuffle=True, drop_last=True)
    assert sampler.batches_per_epoch == 2
    ours = [row for batch in batches(sampler, 2) for row in batch for _ in range(2)]
    assert ours == theirs
    assert sampler.epoch == 0 and len(next(sampler)) == 3 and sampler.epoch == 1


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("taken", [0, 2, 3, 7])
def test_a_resumed_sampler_goes_on_where_it_was(taken: int, shuffle: bool) -> None:
    whole = EpochSampler(8, 3, seed=1, shuffle=shuffle)
    batches(whole, taken)
    resumed = EpochSampler(8, 3, seed=1, shuffle=shuffle)
    resumed.load_state_dict(whole.state_dict())
    assert batches(resumed, 5) == batches(whole, 5)


def test_kept_batches_are_shuffled_whole_and_a_short_one_stays_the_last() -> None:
    sampler = EpochSampler(11, 3, seed=5, shuffle=True, keep_batches=True)
    epochs = [batches(sampler, sampler.batches_per_epoch) for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch[:-1]) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and epoch[-1] == [9, 10]
    assert len({str(epoch) for epoch in epochs}) > 1
    assert batches(EpochSampler(5, 3, seed=5, shuffle=False, keep_batches=True), 2) == [[0, 1, 2], [3, 4]]


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="0 rows"):
        EpochSampler(0, 4, seed=0, shuffle=False)
    with pytest.raises(UserError, match="3 rows"):
        EpochSampler(3, 4, seed=0, shuffle=False, drop_last=True)


def test_microbatches_are_slices_in_order() -> None:
    rows = list(range(8))
    assert shard(rows, dp_rank=0, dp_size=2, micro_batch=2) == [[0, 1], [4, 5]]
    assert shard(rows, dp_rank=1, dp_size=2, micro_batch=2) == [[2, 3], [6, 7]]


def test_a_short_batch_is_shared_out() -> None:
    parts = [shard(list(range(6)), dp_rank=rank, dp_size=2, micro_batch=2) for rank in range(2)]
    assert parts == [[[0, 1], [4]], [[2, 3], [5]]]
    parts = [shard([7], dp_rank=rank, dp_size=2, micro_batch=2) for rank in range(2)]
    assert parts == [[[7]], [[]]]  # the second rank feeds a dummy


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 40), dp_size=st.integers(1, 5), micro_batch=st.integers(1, 4))
def test_no_row_is_lost_or_repeated(rows: int, dp_size: int, micro_batch: int) -> None:
    order = list(range(100, 100 + rows))
    parts = [shard(order, dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch) for rank in range(dp_size)]
    assert sorted(row for part in parts for microbatch in part for row in microbatch) == order
    assert all(part and all(len(microbatch) <= micro_batch for microbatch in part) for part in parts)
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    stride = itertools.zip_longest(*parts, fillvalue=[])
    assert [row for step in stride for microbatch in step for row in microbatch] == order
