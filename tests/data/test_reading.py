"""Datasets from files and directories, and preparation once for the job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from megalign.cli import _datasets
from megalign.config import SFTConfig
from megalign.data.reading import load_rows, load_split, mixed
from megalign.data.table import as_table, take_rows
from megalign.errors import UserError

ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]


def write(path: Path, rows: list[dict[str, object]] = ROWS) -> str:
    dataset = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".csv":
        dataset.to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_a_file_is_its_train_split(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows.{suffix}")
    assert load_split(SFTConfig(dataset_name=path), "train").to_list() == ROWS
    with pytest.raises(UserError, match="no split 'test'.*eval_dataset_name"):
        load_split(SFTConfig(dataset_name=path), "test")


def test_rows_to_evaluate_on_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:1])
    args = SFTConfig(dataset_name=path, eval_dataset_name=held_out)
    assert load_split(args, "test", for_evaluation=True).to_list() == ROWS[:1]
    assert load_split(args, "train").to_list() == ROWS
    with pytest.raises(UserError, match="rows.jsonl' has no split 'test'"):
        load_split(args, "test")


def test_a_split_of_the_same_name_is_trained_on_and_evaluated_on_by_its_use(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{name}.jsonl", [{"text": name}] * count) for name, count in (("a", 4), ("b", 2))]
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:1])
    asked = {"dataset_test_split": "train", "eval_strategy": "steps"}
    train_rows, eval_rows = _datasets(SFTConfig(dataset_name=names[0], eval_dataset_name=held_out, **asked))
    assert texts(train_rows) == ["a"] * 4 and texts(eval_rows) == ["one"]
    train_rows, eval_rows = _datasets(SFTConfig(dataset_name=names, dataset_weights=[0.5, 0.5], **asked))
    assert texts(eval_rows) == ["a"] * 4 + ["b"] * 2 != texts(train_rows)[:6]
    assert _datasets(SFTConfig(dataset_name=names[0], dataset_test_split="train"))[1] is None


def test_a_directory_of_files_has_the_splits_that_they_are_named_for(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[1:])
    assert load_rows(str(tmp_path), split="train").to_list() == ROWS
    assert load_rows(str(tmp_path), split="test").to_list() == ROWS[1:]


def test_directories_of_save_to_disk_are_read(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "one"), split="train").to_list() == ROWS
    assert load_rows(str(tmp_path / "two"), split="test").to_list() == ROWS[1:]


def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    cases = {
        "nosuch.jsonl": "does not exist",
        "nosuch": "does not exist",
        "empty": "holds no .jsonl",
        "rows.txt": "ends in '.txt'",
        "broken.jsonl": "cannot be read as json",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_rows(str(tmp_path / name), split="train")
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="dataset_name is missing"):
        load_split(SFTConfig(), "train")


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "as json: it holds no rows; mend"),
    "blank.jsonl": (b"\n", "as json: it holds no rows; mend"),
    "empty.parquet": (b"", "as parquet: it holds no rows; mend"),
    "torn.parquet": (b"PAR1 and then nothing", "as parquet: Parquet magic bytes not found"),
    "empty.csv": (b"", "as csv: it holds no rows; mend"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_holds_no_rows_or_is_torn_is_one_line(tmp_path: Path, name: str, streaming: bool) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    if streaming and name in ("blank.jsonl", "empty.csv"):  # found out when it is read
        stream = load_rows(str(tmp_path / name), split="train", streaming=True)
        if name == "blank.jsonl":
            assert len(take_rows(stream, 1)) == 0
        else:
            with pytest.raises(UserError, match="streamed rows cannot be read: it holds no rows"):
                take_rows(stream, 1)
        return
    with pytest.raises(UserError, match=message) as caught:
        load_rows(str(tmp_path / name), split="train", field="eval_dataset_name", streaming=streaming)
    assert str(caught.value).startswith("eval_dataset_name=") and name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("train.jsonl", b"\n"), ("train.jsonl", b""), ("train.parquet", b"PAR1")]
)
def test_a_directory_of_such_files_is_one_line_too(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read: .*; (mend or )?replace its files") as caught:
        load_rows(str(tmp_path), split="train")
    assert str(tmp_path) in str(caught.value) and "dataset_config" not in str(caught.value)


# ---- rows of Python


MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    "values",
    [
        ["x", "y", [MESSAGE]],
        [1, 2, "x"],
        ["x", "y", 1],
        [[MESSAGE], [MESSAGE], [{**MESSAGE, "content": ["x"]}]],
        [1, 2, 10**30],
        ["x", None, object()],
    ],
)
def test_rows_of_mixed_types_are_named_by_column_and_row(values: list[object]) -> None:
    rows = [{"fine": place, "mixed": value} for place, value in enumerate([*values, values[0]])]
    with pytest.raises(UserError, match="dataset row 2: its 'mixed' .*; give the column one type") as caught:
        as_table(rows)
    assert "\n" not in str(caught.value)
    assert as_table(rows[:2])["fine"] == [0, 1]


def _calling(argument: str, value: object) -> dict[str, object]:
    call = {"function": {"name": "f", "arguments": {argument: value}}}
    schema = {"name": "f", "parameters": {"properties": {argument: {"type": "integer"}}}}
    return {"messages": [MESSAGE, {"role": "assistant", "tool_calls": [call]}], "tools": [schema]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["", '{"messages": [\n'])
def test_a_tools_arguments_are_its_own_however_rows_are_read(tmp_path: Path, ending: str, streaming: bool) -> None:
    rows = [_calling("a", 1), _calling("b", 2), _calling("c", [3])]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + ending)
    found = load_rows(str(file), split="train", streaming=streaming, skip_bad_rows=True)
    found = take_rows(found, 4, skip_bad_rows=True) if streaming else found
    assert [{name: row[name] for name in rows[0]} for row in found][:3] == rows
    assert list(as_table(rows)) == rows
    assert list(take_rows(IterableDataset.from_generator(lambda: iter(rows)), 3)) == rows


# ---- configurations


CARD = """---
configs:
- config_name: short
  data_files: short.jsonl
- config_name: long
  data_files: long.jsonl
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_is_one_that_the_directorys_card_lists(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "README.md").write_text(CARD)
    write(tmp_path / "short.jsonl", ROWS[:1])
    write(tmp_path / "long.jsonl", ROWS)
    for config, wanted in {"short": ROWS[:1], "long": ROWS}.items():
        args = SFTConfig(dataset_name=str(tmp_path), dataset_config=config, streaming=streaming, max_steps=1)
        assert list(load_split(args, "train")) == wanted
    for config in ("medium", None):
        with pytest.raises(UserError, match=f"with dataset_config={config!r} cannot be read: .*short") as caught:
            load_split(SFTConfig(dataset_name=str(tmp_path), dataset_config=config, streaming=streaming), "train")
        assert "\n" not in str(caught.value)


def test_a_configuration_of_rows_that_have_none_is_refused(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name, what in {write(tmp_path / "rows.jsonl"): "is a file", str(tmp_path / "saved"): "by save_to_disk"}.items():
        with pytest.raises(UserError, match=f"dataset_config='main'.*{what}; leave it out"):
            load_split(SFTConfig(dataset_name=name, dataset_config="main"), "train")


# ---- several datasets


def write_several(tmp_path: Path) -> list[str]:
    """Three files of 6, 3 and 2 rows."""
    return [
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{place}"} for place in range(count)])
        for name, count in (("a", 6), ("b", 3), ("c", 2))
    ]


def texts(rows: Dataset | IterableDataset) -> list[str]:
    return [row["text"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_several_datasets_follow_one_another(tmp_path: Path, streaming: bool) -> None:
    args = SFTConfig(dataset_name=write_several(tmp_path), streaming=streaming, max_steps=1)
    assert texts(load_split(args, "train")) == [*(f"a{n}" for n in range(6)), "b0", "b1", "b2", "c0", "c1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_the_probabilities_with_which_rows_are_drawn(tmp_path: Path, streaming: bool) -> None:
    names = [write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(1000)]) for name in "ab"]
    args = SFTConfig(dataset_name=names, dataset_weights=[9, 3], streaming=streaming, max_steps=1)
    rows = texts(load_split(args, "train"))
    first = [text[0] for text in rows[:1200]].count("a") / 1200
    assert abs(first - 0.75) < 0.05  # four standard deviations of 1200 draws
    # a is read whole after some 1333 draws, b after some 4000: meanwhile a starts again
    assert [text for text in rows if text[0] == "b"] == [f"b{n}" for n in range(1000)]
    a_rows = [text for text in rows if text[0] == "a"]
    assert a_rows == [f"a{place % 1000}" for place in range(len(a_rows))] and 2500 < len(a_rows) < 3500


def test_the_mixture_is_the_data_seeds_whether_streamed_or_not(tmp_path: Path) -> None:
    names = write_several(tmp_path)

    def rows(**fields: object) -> list[str]:
        return texts(load_split(SFTConfig(dataset_name=names, dataset_weights=[0.5, 0.2, 0.3], **fields), "train"))

    assert rows(data_seed=7) == rows(seed=7) == rows(seed=7, streaming=True, max_steps=1) != rows()
    assert set(rows()) == {*(f"a{n}" for n in range(6)), "b0", "b1", "b2", "c0", "c1"}


def test_rows_to_evaluate_on_are_each_taken_once_whatever_the_weights(tmp_path: Path) -> None:
    names = []
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [{"text": "x"}])
        write(tmp_path / name / "test.jsonl", [{"text": f"{name}{place}"} for place in range(count)])
        names.append(str(tmp_path / name))
    args = SFTConfig(dataset_name=names, dataset_weights=[0.9, 0.1])
    assert texts(load_split(args, "test", for_evaluation=True)) == ["a0", "a1", "b0", "b1", "b2"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
def test_datasets_that_do_not_go_together_are_named(
    tmp_path: Path, weights: list[float] | None, streaming: bool
) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": "one"}])
    cases = {
        write(tmp_path / "more.jsonl", [{"text": "one", "n": 1}]): "'text'.*more.jsonl', whose columns are 'text', 'n'",
        write(tmp_path / "lists.jsonl", [{"text": ["one"]}]): "lists.jsonl' do not go together: .*text",
    }
    for other, message in cases.items():
        args = SFTConfig(dataset_name=[text, other], dataset_weights=weights, streaming=streaming, max_steps=1)
        with pytest.raises(UserError, match=message) as caught:
            load_split(args, "train")
        assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_dataset_without_rows_cannot_be_mixed() -> None:
    parts = [Dataset.from_list(ROWS), Dataset.from_list(ROWS).select([])]
    with pytest.raises(UserError, match="'none' has no rows to mix"):
        mixed(parts, ["some", "none"], weights=[1, 1], seed=0)


# ---- streams


def test_whatever_is_read_can_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    names = [
        *(write(tmp_path / f"rows.{suffix}") for suffix in ("jsonl", "json", "parquet", "csv")),
        str(Path(write(tmp_path / "files" / "train.jsonl")).parent),
        str(tmp_path / "one"),
        str(tmp_path / "two"),
    ]
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "two")
    for name in names:
        stream = load_rows(name, split="train", streaming=True)
        assert isinstance(stream, IterableDataset) and list(stream) == ROWS, name
    with pytest.raises(UserError, match="no split 'test'"):
        load_rows(names[0], split="test", streaming=True)


def counting(count: int, read: list[int]) -> IterableDataset:
    def rows() -> Iterator[dict[str, int]]:
        for place in range(count):
            read.append(place)
            yield {"n": place}

    return IterableDataset.from_generator(rows)


def test_no_more_of_a_stream_is_read_than_is_taken() -> None:
    read: list[int] = []
    assert take_rows(counting(10**9, read), 5)["n"] == [0, 1, 2, 3, 4]
    assert read == [0, 1, 2, 3, 4]


def test_a_short_stream_gives_what_it_has() -> None:
    assert take_rows(counting(3, []), 5)["n"] == take_rows(counting(3, []), None)["n"] == [0, 1, 2]


def test_a_shuffled_stream_is_drawn_from_a_buffer_by_the_seed() -> None:
    def taken(seed: int) -> list[int]:
        return list(take_rows(counting(5000, []), 50, shuffle=True, seed=seed)["n"])

    assert taken(1) == taken(1) != taken(2)
    assert len(set(taken(1))) == 50 and 100 < max(taken(1)) < 1050  # 1000 rows of the buffer, and those that follow


def test_rows_of_a_stream_may_lack_columns() -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1}, {"a": 2, "b": "x"}]))
    assert take_rows(stream, 2).to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    with pytest.raises(UserError, match="row 1: its 'a' does not go .*'x'"):
        take_rows(IterableDataset.from_generator(lambda: iter([{"a": 1}, {"a": "x"}])), 2)


def test_a_broken_line_of_a_stream_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    stream = load_rows(str(tmp_path / "broken.jsonl"), split="train", streaming=True)
    with pytest.raises(UserError, match="the streamed rows cannot be read: JSON parse error") as caught:
        take_rows(stream, 2)
    assert "\n" not in str(caught.value)
