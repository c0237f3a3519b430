"""The rows that a skipped step names are those of the user's dataset, whatever preparing did to them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from megalign.batch import Batch
from megalign.config import DPOConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig
from megalign.data.balance import Budget
from megalign.data.broken import Skipped
from megalign.data.packing import sequences_of
from megalign.data.preference import (
    prepare_orpo_pairs,
    prepare_pairs,
    prepare_reward_pairs,
    sequences_of_pair,
    sequences_of_reward_pair,
)
from megalign.data.rows import ROW_NUMBER
from megalign.data.supervised import prepare_sft
from megalign.data.unpaired import prepare_unpaired, sequence_of_unpaired
from megalign.trainers import reference
from megalign.trainers.offline import OfflineTrainer
from megalign.trainers.reference import Reference

FIRST = 100  # the token that row 0 begins with; row 1's is the next


def batches_of(rows: Dataset, sequences: Any, *, rank: int = 0, budget: Budget | None = None) -> list[Batch]:
    """What the first of two data-parallel ranks, or the second, learns from in a step of all rows."""
    groups = SimpleNamespace(dp=SimpleNamespace(rank=rank, size=2), token_multiple=4, sequence_multiple=1)
    trainer = SimpleNamespace(
        groups=groups,
        sequences=lambda some: [sequence for row in some for sequence in sequences(row)],
        with_columns=lambda batches, *_: batches,
        run=SimpleNamespace(window=SimpleNamespace(add=lambda metrics: None)),
    )
    return OfflineTrainer._batches(trainer, rows, range(len(rows)), 2, budget)


def rows_named(rows: Dataset, sequences: Any, budget: Budget | None = None) -> list[int]:
    """The rows that the batches of both ranks name, which are those whose sequences they hold."""
    named = []
    for batch in [batch for rank in (0, 1) for batch in batches_of(rows, sequences, rank=rank, budget=budget)]:
        starts = batch.cu_seqlens[: batch.num_sequences].long()
        assert set(batch.rows) == {int(token) - FIRST for token in batch.tokens[starts]}
        named += batch.rows
    return named


def test_answers_that_are_shuffled_and_pairs_that_are_taken_apart() -> None:
    answers = [{"prompt_ids": [FIRST + n], "completion_ids": [n + 1], "label": n % 2 == 0} for n in range(12)]
    rows = prepare_unpaired(Dataset.from_list(answers), None, KTOConfig(), block=4, shuffle_seed=3)
    named = rows_named(rows, lambda row: [sequence_of_unpaired(row)])
    assert sorted(named) == list(range(12)) != named


@pytest.mark.parametrize("budget", [None, Budget(tokens=8, cost=float, shares_prefixes=True)])
def test_rows_that_skip_bad_rows_leaves_out(budget: Budget | None) -> None:
    tokens = [{"input_ids": [FIRST + n, 1, 2] if n not in (0, 3) else []} for n in range(8)]
    tokens[0] = {"input_ids": [FIRST, -1]}
    args = SFTConfig(shuffle_dataset=False, max_length=2)
    rows = prepare_sft(Dataset.from_list(tokens), None, args, vocab_size=200, skipped=Skipped())
    assert sorted(rows_named(rows, sequences_of, budget)) == [1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_a_pack_names_the_rows_in_it(strategy: str) -> None:
    tokens = [{"input_ids": [FIRST + n] * (1 + n % 3)} for n in range(12)]
    args = SFTConfig(max_length=4, packing=True, packing_strategy=strategy)
    packs = prepare_sft(Dataset.from_list(tokens), None, args)
    assert len(packs) < 12
    for batch in batches_of(packs, sequences_of):
        held = batch.tokens[~batch.is_padding].unique().tolist()
        assert sorted(set(batch.rows)) == [token - FIRST for token in held]


@pytest.mark.parametrize("kind", ["DPO", "ORPO", "Reward"])
def test_pairs_that_are_dropped_for_their_length(kind: str) -> None:
    prepare, config = {
        "DPO": (prepare_pairs, DPOConfig),
        "ORPO": (prepare_orpo_pairs, ORPOConfig),
        "Reward": (prepare_reward_pairs, RewardConfig),
    }[kind]
    pairs = [
        {"prompt_ids": [FIRST + n] * (9 if n in (1, 4) else 1), "chosen_ids": [1, 2], "rejected_ids": [3]}
        for n in range(7)
    ]
    sequences = sequences_of_pair
    if kind == "Reward":
        sequences = sequences_of_reward_pair
        pairs = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in pairs]
    rows = prepare(Dataset.from_list(pairs), None, config(max_length=6))
    assert sorted(rows_named(rows, sequences)) == [0, 2, 3, 5, 6]


def test_kept_logprobs_go_with_the_numbers_that_the_rows_have_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    monkeypatch.setattr(Reference, "_logprobs", lambda *_: computed.append(1) or [[-1.0], [-2.0]])
    monkeypatch.setattr(reference, "barrier", lambda axis: None)
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), params_dtype_name="fp32")
    groups = SimpleNamespace(world=SimpleNamespace(rank=0, size=1))
    (tmp_path / "model").mkdir()
    found = []
    for numbers in ([0, 1], [4, 2]):
        rows = Dataset.from_list([{"chosen_ids": [5]}, {"chosen_ids": [6]}]).add_column(ROW_NUMBER, numbers)
        kept = Reference(str(tmp_path / "model"), args, groups).precomputed(rows, {"ref_logprobs": lambda row: row}, 1)
        assert kept["ref_logprobs"] == [[-1.0], [-2.0]] and kept["chosen_ids"] == [[5], [6]]
        found.append(kept[ROW_NUMBER])
    assert found == [[0, 1], [4, 2]] and computed == [1]
