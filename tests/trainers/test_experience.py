"""Where completions go, and the counts that their losses are divided by."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalign.batch import Batch, Completion, Counts
from megalign.trainers.experience import (
    ExperienceMaker,
    Minibatch,
    completion_metrics,
    split_completions,
    step_counts,
)


def _completion(index: int, length: int, finish: str) -> Completion:
    return Completion(
        index=index,
        prompt_ids=[5, 6],
        completion_ids=list(range(10, 10 + length)),
        logprobs=[-1.0] * length,
        finish_reason=finish,  # type: ignore[arg-type]
        policy_version=0,
    )


COMPLETIONS = [
    _completion(0, 3, "stop"),
    _completion(1, 4, "length"),
    _completion(2, 1, "stop"),
    _completion(3, 2, "stop"),
]


def _maker(dp_rank: int = 0, dp_size: int = 1, **changes: Any) -> ExperienceMaker:
    args = SimpleNamespace(per_device_train_batch_size=1, seed=3, mask_truncated_completions=False, temperature=0.5)
    vars(args).update(changes)
    groups = SimpleNamespace(dp=SimpleNamespace(rank=dp_rank, size=dp_size), token_multiple=4, sequence_multiple=1)
    return ExperienceMaker(args, groups, None, None, None, None, needs_old_logprobs=False, corrects_sampler=False)  # type: ignore[arg-type]


def test_counts_are_of_the_step_and_dapos_denominator_of_the_round() -> None:
    assert step_counts(_maker().loss_tokens(COMPLETIONS), [0, 1], num_updates=2) == Counts(
        tokens=3 + 4, sequences=2, generation_tokens=(3 + 4 + 1 + 2) / 2
    )


def test_truncated_completions_count_as_sequences_but_not_as_tokens() -> None:
    loss_tokens = _maker(mask_truncated_completions=True).loss_tokens(COMPLETIONS)
    assert step_counts(loss_tokens, range(4)) == Counts(tokens=6, sequences=4, generation_tokens=6)


def test_counts_are_those_of_the_batches_of_all_ranks() -> None:
    for changes in ({}, {"mask_truncated_completions": True}):
        batches = [batch for rank in range(2) for batch in _maker(rank, 2, **changes).batches(COMPLETIONS, range(4), 1)]
        counts = step_counts(_maker(**changes).loss_tokens(COMPLETIONS), range(4))
        assert sum(int(batch["loss_mask"].sum()) for batch in batches) == counts.tokens
        assert sum(batch.num_sequences for batch in batches) == counts.sequences


def test_each_completion_is_in_one_batch_with_its_own_advantage() -> None:
    advantages = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = {}
    for rank in range(2):
        maker = _maker(rank, 2)
        minibatches = maker.minibatches(COMPLETIONS, step=0, num_updates=2)
        for minibatch in maker.with_sequence_column(minibatches, "advantages", advantages):
            for batch in minibatch.batches:
                assert batch.num_tokens % 4 == 0
                assert batch["temperature"].tolist() == [0.5]
                assert batch["ended"].tolist() == [float(batch["index"][0] != 1)]
                found[int(batch.lengths[0])] = float(batch["advantages"][0])
    lengths = [2 + len(completion.completion_ids) for completion in COMPLETIONS]
    assert found == {length: pytest.approx(float(a)) for length, a in zip(lengths, advantages, strict=True)}


def test_one_step_keeps_the_order_and_more_are_drawn_from_the_whole_round() -> None:
    assert split_completions(6, 1, seed=0, step=0) == [[0, 1, 2, 3, 4, 5]]
    parts = split_completions(64, 4, seed=0, step=0)
    assert sorted(row for part in parts for row in part) == list(range(64))
    assert [len(part) for part in parts] == [16] * 4
    assert parts[0] != list(range(16))
    assert parts == split_completions(64, 4, seed=0, step=0)
    assert parts != split_completions(64, 4, seed=0, step=1)


def test_a_minibatch_comes_back_from_a_checkpoint_as_it_was(tmp_path: Any) -> None:
    (minibatch,) = _maker().minibatches(COMPLETIONS[:1], step=0, num_updates=1)
    minibatch = replace(minibatch, metrics={"noted": 0.25})
    torch.save(minibatch.state(), tmp_path / "m.pt")
    back = Minibatch.from_state(torch.load(tmp_path / "m.pt", weights_only=True))
    assert back.counts == minibatch.counts and back.metrics == {"noted": 0.25}
    before, after = minibatch.batches[0], back.batches[0]
    assert isinstance(after, Batch) and after.num_sequences == before.num_sequences
    for name in ("loss_mask", "rollout_logprobs", "index", "temperature"):
        assert torch.equal(before[name], after[name])


def _of_rows(*rows: int | None) -> list[Completion]:
    """Completions of 1, 2, ... tokens, each of a prompt of the dataset."""
    return [replace(_completion(place, place + 1, "stop"), row_number=row) for place, row in enumerate(rows)]


@pytest.mark.parametrize(("begun", "resumed"), [(2, 1), (1, 2), (2, 2)])
def test_batches_that_are_dealt_anew_name_the_dataset_rows_of_their_sequences(begun: int, resumed: int) -> None:
    rows = [70, 70, 31, 31, 8, 8]
    of_length = {2 + place + 1: row for place, row in enumerate(rows)}
    step = {"step": 0, "num_updates": 1}
    parts = [
        Minibatch.from_state(
            _maker(rank, begun, per_device_train_batch_size=3).minibatches(_of_rows(*rows), **step)[0].state()
        )
        for rank in range(begun)
    ]
    found = []
    for rank in range(resumed):
        for batch in _maker(rank, resumed, per_device_train_batch_size=2).dealt_anew(parts).batches:
            assert list(batch.rows) == [of_length[length] for length in batch.lengths.tolist()]
            found += batch.rows
    assert sorted(found) == sorted(rows)


def test_rows_that_are_not_known_are_not_made_up() -> None:
    (minibatch,) = _maker(per_device_train_batch_size=2).minibatches(_of_rows(5, None, 6), step=0, num_updates=1)
    assert [batch.rows for batch in _maker().dealt_anew([minibatch]).batches] == [(), (), (6,)]


def test_completion_metrics_of_hand_counted_lengths() -> None:
    metrics = completion_metrics(COMPLETIONS)
    assert metrics == {
        "completions/mean_length": 2.5,
        "completions/min_length": 1.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 2.0,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 3.0,
    }
    assert completion_metrics(COMPLETIONS[1:2])["completions/mean_terminated_length"] == 0.0
