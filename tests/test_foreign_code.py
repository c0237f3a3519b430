"""Code and pickles that come with a model, a dataset or a config: nothing of them runs, and what needs them is refused.

Checkpoints are tested beside their readers (tests/checkpoints, tests/patches).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from megalign.cli import parse_arguments
from megalign.config import SFTConfig
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_files import read_config
from megalign.data.chat import load_tokenizer
from megalign.data.reading import load_rows
from megalign.data.table import take_rows
from megalign.errors import UserError
from megalign.scripts import ModelConfig
from tests.data.tokenizers_made_here import make_tokenizer
from tests.tiny import CONFIGS

CODE = "import pathlib\npathlib.Path('HARM').touch()\n"


class Harm:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch HARM",)


@pytest.fixture(autouse=True)
def unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The test runs where code would leave its file, and nobody answers a question."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield
    assert not Path("HARM").exists()


def refused(path: str, *, streaming: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        rows = load_rows(path, split="train", streaming=streaming)
        take_rows(rows, 1)
    assert (
        f"={path.removeprefix('./')!r}" in str(caught.value)
        and "\n" not in str(caught.value)
        and ";" in str(caught.value)
    )
    return str(caught.value)


# ---- models and tokenizers


def model_directory(**config: Any) -> Path:
    path = Path("model")
    path.mkdir()
    (path / "configuration_x.py").write_text(CODE)
    (path / "modeling_x.py").write_text(CODE)
    (path / "config.json").write_text(json.dumps(config))
    return path


AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}


def test_a_model_of_its_own_code_is_refused() -> None:
    path = model_directory(architectures=["XForCausalLM"], model_type="x", auto_map=AUTO_MAP)
    with pytest.raises(UserError, match="architecture 'XForCausalLM' is not supported"):
        architecture_of(read_config(path))


def test_a_known_model_that_brings_code_is_read_without_it() -> None:
    path = model_directory(
        **CONFIGS["llama"]().to_dict() | {"architectures": ["LlamaForCausalLM"], "auto_map": AUTO_MAP}
    )
    assert architecture_of(read_config(path)).family == "llama"


@pytest.mark.parametrize("known", [True, False])
def test_a_tokenizer_of_its_own_code_is_refused_and_asks_no_question(known: bool) -> None:
    path = model_directory(**CONFIGS["llama"]().to_dict())
    make_tokenizer().save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    if not known:
        settings["tokenizer_class"] = "XTokenizer"
        (path / "tokenizer.json").unlink()
        (path / "config.json").write_text(json.dumps({"model_type": "x"}))
    settings["auto_map"] = {"AutoTokenizer": ["modeling_x.XTokenizer", "modeling_x.XTokenizer"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if known:
        assert load_tokenizer(str(path))("one")["input_ids"]  # transformers' own class reads it
        return
    with pytest.raises(UserError, match="model holds no tokenizer that loads") as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_trust_remote_code_is_off_and_refused_where_it_is_asked_for() -> None:
    assert ModelConfig().trust_remote_code is False
    for ask, given in (
        (ModelConfig, {"trust_remote_code": True}),
        (SFTConfig, {"model_init_kwargs": {"trust_remote_code": True}}),
    ):
        with pytest.raises(UserError, match="trust_remote_code.*refused"):
            ask(**given)


# ---- datasets


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".py", ".pickle", ".bin", ".npy"])
def test_a_file_of_pickles_or_code_is_no_dataset(suffix: str) -> None:
    Path(f"rows{suffix}").write_bytes(CODE.encode() if suffix == ".py" else pickle.dumps(Harm()))
    assert f"ends in {suffix!r}" in refused(f"./rows{suffix}")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directorys_pickles_are_left_alone(streaming: bool) -> None:
    Path("rows").mkdir()
    Path("rows/train.pkl").write_bytes(pickle.dumps(Harm()))
    assert "holds no .jsonl" in refused("./rows", streaming=streaming)
    Path("rows/train.jsonl").write_text('{"a": 1}\n')
    assert take_rows(load_rows("./rows", split="train", streaming=True), 1)["a"] == [1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_loading_script_is_refused(streaming: bool) -> None:
    Path("rows").mkdir()
    Path("rows/rows.py").write_text(CODE)
    Path("rows/train.jsonl").write_text('{"a": 1}\n')
    assert "scripts are no longer supported" in refused("./rows", streaming=streaming)


CARDS = {
    "a call": "configs: !!python/object/apply:os.system ['touch HARM']",
    "a number": "configs: [5]",
    "a file elsewhere": "configs:\n- config_name: a\n  data_files: ../../etc/passwd",
    "features": "dataset_info:\n  features: 5",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_harmful_card_is_refused(card: str) -> None:
    Path("rows").mkdir()
    Path("rows/README.md").write_text(f"---\n{CARDS[card]}\n---\n")
    Path("rows/train.jsonl").write_text('{"a": 1}\n')
    for streaming in (False, True):
        refused("./rows", streaming=streaming)


SAVED: dict[str, tuple[str, bytes | None]] = {
    "half a state": ("state.json", b"{"),
    "an empty state": ("state.json", b"{}"),
    "a list for a state": ("state.json", b"[]"),
    "a pickle for a state": ("state.json", pickle.dumps(Harm())),
    "an unknown type": ("dataset_info.json", b'{"features": {"a": {"_type": "Harm"}}}'),
    "no information": ("dataset_info.json", b"x"),
    "junk for rows": ("data-00000-of-00001.arrow", b"junk"),
    "a pickle for rows": ("data-00000-of-00001.arrow", pickle.dumps(Harm())),
    "no rows": ("data-00000-of-00001.arrow", None),
}


@pytest.mark.parametrize("damage", SAVED)
def test_a_damaged_directory_of_save_to_disk_is_refused(damage: str) -> None:
    Dataset.from_list([{"a": 1}] * 5).save_to_disk("rows")
    name, content = SAVED[damage]
    Path("rows", name).unlink()
    if content is not None:
        Path("rows", name).write_bytes(content)
    for streaming in (False, True):
        assert "was written by save_to_disk and cannot be read" in refused("./rows", streaming=streaming)


def test_half_of_saved_rows_and_no_splits_are_refused() -> None:
    Dataset.from_list([{"a": 1}] * 500).save_to_disk("rows")
    file = Path("rows/data-00000-of-00001.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused("./rows")
    shutil.rmtree("rows")
    Path("rows").mkdir()
    Path("rows/dataset_dict.json").write_text("{}")
    refused("./rows")


# ---- configs


def test_a_config_calls_nothing() -> None:
    Path("run.yaml").write_text("output_dir: !!python/object/apply:os.system ['touch HARM']\n")
    with pytest.raises(UserError, match="is not YAML: could not determine a constructor for the tag"):
        parse_arguments(SFTConfig, ["--config", "run.yaml"])
    for word in ("!!python/object/apply:os.system ['touch HARM']", "{a: !!python/object/apply:os.system [x]}"):
        with pytest.raises(UserError, match="lr_scheduler_kwargs="):
            parse_arguments(SFTConfig, ["--lr_scheduler_kwargs", word])
