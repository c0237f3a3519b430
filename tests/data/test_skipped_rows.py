"""skip_bad_rows: what would be refused is left out and counted, in every trainer's rows and in files that are torn."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers.utils import logging as transformers_logging

from megalign.config import SFTConfig
from megalign.data import table
from megalign.data.broken import BROKEN, Skipped
from megalign.data.reading import load_rows, load_split
from megalign.data.rows import ROW_NUMBER, without_numbers
from megalign.data.table import as_table, take_rows
from megalign.errors import UserError
from tests.data.fuzzed_rows import FORMATS, VOCAB
from tests.data.test_fuzzed_rows import TOKENIZERS, reader_of

GOOD = '{"text": "one", "n": 1}\n'


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged: transformers' loggers hand nothing on to pytest's."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = transformers_logging.get_logger("megalign.data")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def first(strategy: Any) -> Any:
    """What reader_of draws: the first of the possibilities."""
    return strategy.elements[0]


BAD: dict[str, dict[str, Any]] = {
    "SFT": {"prompt": "1 + 2 =", "completion": None},
    "Reward": {"chosen": "", "rejected": "one two four", "margin": float("nan")},
    "DPO": {"prompt": None, "chosen": None, "rejected": " the dog?"},
    "ORPO": {"prompt": None, "chosen": " the sky?", "rejected": None},
    "KTO": {"prompt": "What color is", "completion": " the sky?", "label": None},
    "prompts": {"prompt": None, "answer": 3},
}
PLAIN = {"SFT": "prompt and completion", "Reward": "text without a prompt", "DPO": "text", "ORPO": "text",
         "KTO": "text", "prompts": "text"}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_each_trainers_rows_are_the_good_ones(kind: str, said: list[str]) -> None:
    good, reader = FORMATS[kind][PLAIN[kind]], reader_of(kind, first)
    numbers: list[int] = []

    def prepared(rows: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        found = reader.of_table(as_table(rows), TOKENIZERS[0], reader.args, vocab_size=VOCAB, **reader.more, **more)
        numbers[:] = found[ROW_NUMBER]
        kept = without_numbers(found).to_list()
        return [{name: value for name, value in row.items() if not name.startswith("kl_")} for row in kept]

    rows = [good, BAD[kind], good, *[BAD[kind]] * 3]
    with pytest.raises(UserError, match="dataset row 1: "):
        prepared(rows)
    skipped = Skipped()
    alone = prepared([good, good])
    assert prepared(rows, skipped=skipped) == alone and numbers == [0, 2]
    assert (skipped.count, skipped.total) == (4, 6)
    (line,) = said
    assert line.startswith("4 of 6 rows are left out (skip_bad_rows): dataset row 1: ") and line.endswith(
        "; and 1 more"
    )
    assert prepared([good], skipped=skipped) == prepared([good]) and skipped.count == 0
    with pytest.raises(UserError, match="skip_bad_rows leaves none of 2 rows; the first of them: dataset row 0: "):
        prepared([BAD[kind]] * 2, skipped=skipped)


# ---- lines of files

TORN: dict[str, tuple[bytes, str]] = {
    "cut in its last line": (b'{"text": "tw', "line 4 is no JSON (Unterminated string.*may have been cut"),
    "a number": (b"5\n" + GOOD.encode(), "line 4 is a int and no mapping"),
    "a list": (b'["a"]\n', "line 4 is a list"),
    "zeros": (b"\x00\x00\x00\n" + GOOD.encode(), "line 4 is no JSON"),
    "half a character": (b'{"text": "\\ud800"}\n', "line 4 is no JSON (.*surrogates"),
    "a column twice": (b'{"text": "a", "text": "b"}\n', "line 4 is no JSON ('text' is given twice"),
    "depth": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "line 4 is no JSON"),
    "two rows": (b'{"text": "a"} {"text": "b"}, 3\n', "line 4 is no JSON (Extra data"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", TORN)
def test_a_broken_line_is_named_or_left_out(name: str, streaming: bool, tmp_path: Path) -> None:
    content, message = TORN[name]
    file = tmp_path / "torn.jsonl"
    file.write_bytes((GOOD * 2 + "\n").encode() + content)
    if not streaming:
        with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
            load_rows(str(file), split="train")
        assert str(file) in str(caught.value) and "skip_bad_rows" in str(caught.value)
        assert "\n" not in str(caught.value)
    args = SFTConfig(dataset_name=str(file), skip_bad_rows=True, streaming=streaming, max_steps=1)
    rows: Any = load_split(args, "train")
    rows = take_rows(rows, 10, skip_bad_rows=True) if streaming else rows
    assert rows[:2] == {"text": ["one", "one"], "n": [1, 1], BROKEN: [None, None]}
    assert rows[2][BROKEN].startswith("line 4 is ") and rows[2]["text"] is None
    assert len(rows) == 2 + content.count(b"\n") + (not content.endswith(b"\n"))


def test_a_file_whose_lines_are_all_rows_is_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD * 3)
    assert load_rows(str(tmp_path / "rows.jsonl"), split="train", skip_bad_rows=True).column_names == ["text", "n"]


def test_broken_lines_go_together_with_another_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + "{\n")
    (tmp_path / "b.jsonl").write_text(GOOD)
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    for weights in (None, [0.5, 0.5]):
        rows = load_split(SFTConfig(dataset_name=names, dataset_weights=weights, skip_bad_rows=True), "train")
        assert {row["text"] for row in rows} == {"one", None} and [row[BROKEN] for row in rows].count(None) > 0


def test_text_that_is_not_utf8_is_named_by_its_row_or_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD.encode() + b'{"text": "\xff\xfe", "n": 2}\n')
    reader = reader_of("SFT", first)
    with pytest.raises(UserError, match="dataset row 1: its text is not UTF-8"):
        reader.of_table(load_rows(str(file), split="train"), TOKENIZERS[0], reader.args, vocab_size=VOCAB)
    rows, skipped = load_rows(str(file), split="train", skip_bad_rows=True), Skipped()
    found = reader.of_table(rows, TOKENIZERS[0], reader.args, vocab_size=VOCAB, skipped=skipped)
    assert len(found) == 1 and skipped.first[0].startswith("dataset row 1: line 2 is no JSON")


def test_rows_of_another_type_are_left_out_of_a_list() -> None:
    rows = [{"text": "a"}, {"text": 5}, {"text": "b"}, {"text": [1]}, {"text": None}]
    found = as_table(rows, skip_bad_rows=True)
    assert [row["text"] for row in found] == ["a", None, "b", None, None]
    assert [row[BROKEN] is not None for row in found] == [False, True, False, True, False]


def test_many_rows_of_another_type_cost_no_table_each(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    kind_of = table._Column.kind_of

    def counted(column: Any, values: list[Any]) -> Any:
        looked_at.append(len(values))
        return kind_of(column, values)

    monkeypatch.setattr(table._Column, "kind_of", counted)
    rows = [{"text": [place] if place % 8 == 5 else f"{place}", "n": [] if place % 64 == 9 else place / 3}
            for place in range(512)]  # fmt: skip
    found = as_table(rows, skip_bad_rows=True)
    bad = [place for place in range(512) if place % 8 == 5 or place % 64 == 9]
    assert [place for place, reason in enumerate(found[BROKEN]) if reason is not None] == bad
    assert 512 < sum(looked_at) < 30 * 512


def test_a_row_that_only_goes_with_those_before_it_is_named_all_the_same() -> None:
    rows: list[dict[str, Any]] = [{"n": 1}, {"n": 2**60}, {"n": 1.5}]
    with pytest.raises(UserError, match="dataset row 1: its 'n' does not go into one column"):
        as_table(rows)
    assert as_table(rows, skip_bad_rows=True)["n"] == [1, None, 1.5]


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["cut in half", "without its end", "a torn page", "a torn footer"])
def test_a_parquet_file_that_is_torn_is_refused(
    damage: str, streaming: bool, skip_bad_rows: bool, tmp_path: Path
) -> None:
    file = tmp_path / "rows.parquet"
    Dataset.from_list([{"text": f"x{n}", "n": n} for n in range(3000)]).to_parquet(file)
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut in half": whole[: len(whole) // 2],
            "without its end": whole[:-8],
            "a torn page": whole[:200] + b"\xff" * 300 + whole[500:],
            "a torn footer": whole[:-300] + bytes(280) + whole[-20:],
        }[damage]
    )
    with pytest.raises(UserError, match="cannot be read") as caught:
        rows = load_rows(str(file), split="train", streaming=streaming, skip_bad_rows=skip_bad_rows)
        take_rows(rows, 3000)
    assert "\n" not in str(caught.value) and "mend or replace the file" in str(caught.value)


def test_a_stream_that_ends_too_soon_says_so_and_gives_what_it_has(said: list[str]) -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"n": 1}, {"n": 2}]))
    assert take_rows(stream, 5)["n"] == [1, 2]
    assert said == ["the stream ends after 2 of the 5 rows that max_steps takes: it begins anew"]
    assert len(take_rows(stream, 2)) == 2 and len(said) == 1


def test_a_broken_lines_reason_stays_short(tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 10**6})[:-2] + "\n" + GOOD)
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path / "long.jsonl"), split="train")
    assert len(str(caught.value)) < 600
