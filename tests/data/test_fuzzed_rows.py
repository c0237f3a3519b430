"""A fuzzer's rows in every format: refused in a sentence, or accepted as tokens that a model can learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from megalign.config import DPOConfig, GRPOConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig
from megalign.data import preference, prompts, supervised, unpaired
from megalign.data.collate import pack
from megalign.data.completions import Completed
from megalign.data.packing import sequences_of
from megalign.data.table import as_table
from megalign.errors import UserError
from tests.data.fuzzed_rows import CASES, FORMATS, VOCAB, columns_of, is_plainly_wrong, malformed
from tests.data.tokenizers_made_here import CHATML, LLAMA3, PLAIN, make_tokenizer, marked, unmarked
from tests.fuzzing import fuzzing

ROWS_OF_A_FORMAT, TABLES_OF_A_FORMAT = 36, 3  # of 29 formats: 1,044 rows alone, and 87 tables of three
TOKENIZERS = [make_tokenizer(template) for template in (unmarked(CHATML), unmarked(LLAMA3), marked(PLAIN))]
MAX_LENGTH = 64
Row = Mapping[str, Any]


class Reader(NamedTuple):
    """How a trainer reads: one row, a table, and what is made of a prepared row."""

    of_row: Callable[..., Mapping[str, Any]]  # row, index, options
    options: dict[str, Any]
    of_table: Callable[..., Dataset]  # rows, tokenizer, args, vocab_size
    args: Any
    more: dict[str, Any]
    sequences: Callable[..., Any]


def reader_of(kind: str, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Reader:
    """The functions that the trainer of this kind calls."""
    if kind == "SFT":
        only = draw(st.sampled_from([(None, False), (True, False), (None, True), (False, False)]))
        args = SFTConfig(completion_only_loss=only[0], assistant_only_loss=only[1], max_length=MAX_LENGTH)
        options = {"form": supervised.SFTFormat("text", *only)}
        return Reader(supervised.tokenized_row, options, supervised.prepare_sft, args, {}, sequences_of)
    if kind == "Reward":
        args, options = RewardConfig(max_length=MAX_LENGTH), {"max_length": MAX_LENGTH}
        of_table, sequences = preference.prepare_reward_pairs, preference.sequences_of_reward_pair
        return Reader(preference.reward_row, options, of_table, args, {}, sequences)
    if kind == "DPO":
        mode = draw(st.sampled_from(["keep_start", "keep_end"]))
        args = DPOConfig(max_length=MAX_LENGTH, truncation_mode=mode)
        options = {"encode": preference._pair_tokens, "limits": preference.Limits(MAX_LENGTH, mode)}
        of_table, sequences = preference.prepare_pairs, preference.sequences_of_pair
        return Reader(preference.pair_row, options, of_table, args, {}, sequences)
    if kind == "ORPO":
        args = ORPOConfig(max_length=MAX_LENGTH, max_completion_length=draw(st.sampled_from([None, 8])))
        limits = preference.Limits(MAX_LENGTH, max_completion_length=args.max_completion_length)
        options = {"encode": preference._orpo_tokens, "limits": limits}
        of_table, sequences = preference.prepare_orpo_pairs, preference.sequences_of_orpo_pair
        return Reader(preference.pair_row, options, of_table, args, {}, sequences)
    if kind == "KTO":
        args, options = KTOConfig(max_length=MAX_LENGTH), {"max_length": MAX_LENGTH}
        return Reader(unpaired.answers_of_row, options, unpaired.prepare_unpaired, args, {"block": 4}, of_kto)
    args, options = GRPOConfig(max_completion_length=16), {"options": {}, "limit": MAX_LENGTH}
    more = {"max_positions": MAX_LENGTH + 16}
    return Reader(prompts.prompt_row, options, prompts.prepare_prompts, args, more, of_prompt)


def of_kto(row: Row) -> list[Row]:
    """Prepared in a table, or the answers of one row."""
    if "input_ids" in row:
        return [unpaired.sequence_of_unpaired(row), unpaired.kl_sequence(row)]
    answers = zip(row["prompt_ids"], row["completion_ids"], strict=True)
    joined = [Completed(prompt + completion, len(prompt)).cut(MAX_LENGTH) for prompt, completion in answers]
    return [{"tokens": each.ids, "loss_mask": each.mask} for each in joined]


def of_prompt(row: Row) -> list[Row]:
    """With a completion behind it."""
    return [{"tokens": [*row["prompt_ids"], 7]}]


def prepared(rows: list[Row], kind: str, draw: st.DataObject, *, as_one: bool) -> tuple[Reader, Any]:
    tokenizer, reader = draw.draw(st.sampled_from(TOKENIZERS)), reader_of(kind, draw.draw)
    table = as_table(rows)
    if as_one:
        return reader, reader.of_table(table, tokenizer, reader.args, vocab_size=VOCAB, **reader.more)
    options = {"tokenizer": tokenizer, "vocab_size": VOCAB, **reader.options}
    return reader, [dict(reader.of_row(row, place, **options)) for place, row in enumerate(table)]


def check(rows: list[Row], kind: str, name: str, draw: st.DataObject, *, as_one: bool) -> None:
    """Refused by one line, or made into tokens, and those into a batch."""
    try:
        reader, found = prepared(rows, kind, draw, as_one=as_one)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, str(error)
        return
    assert not any(is_plainly_wrong(row, columns_of(kind, name)) for row in rows), f"accepted: {rows}"
    for row in found:
        for sequence in reader.sequences(row):
            if as_one or is_kept(sequence):
                check_sequence(sequence, as_one=as_one)


def is_kept(sequence: Row) -> bool:
    """Rows that are too long are empty, and those of SFT without a loss token; a table is left without them."""
    return len(sequence["tokens"]) > 0 and any(sequence.get("loss_mask", [True]))


def check_sequence(sequence: Row, *, as_one: bool) -> None:
    tokens = sequence["tokens"]
    assert all(type(token) is int and 0 <= token < VOCAB for token in tokens), tokens
    assert not as_one or len(tokens) <= MAX_LENGTH + 1  # a row of SFT's is cut with its table
    batch = pack([sequence])  # which asserts that masks and columns are as long as the tokens
    assert batch.num_sequences == 1 and (batch["loss_mask"].any() or sequence["loss_mask"][0]), sequence


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_fuzzed_row_is_refused_in_a_sentence_or_becomes_tokens(kind: str, name: str) -> None:
    @fuzzing(ROWS_OF_A_FORMAT)
    @given(malformed(FORMATS[kind][name]), st.data())
    def run(row: Row, draw: st.DataObject) -> None:
        check([row], kind, name, draw, as_one=False)

    run()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_table_with_fuzzed_rows_is_refused_or_prepared_as_a_whole(kind: str, name: str) -> None:
    good = FORMATS[kind][name]

    @fuzzing(TABLES_OF_A_FORMAT)
    @given(malformed(good), st.integers(0, 2), st.data())
    def run(row: Row, place: int, draw: st.DataObject) -> None:
        rows = [good, good]
        rows.insert(place, row)
        check(rows, kind, name, draw, as_one=True)

    run()
