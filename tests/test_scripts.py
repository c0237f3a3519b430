"""What TRL's scripts import: the parser and get_dataset beside TRL's own, and TRL's scripts up to their trainer."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import trl

import megalign
from megalign import (
    DatasetConfig,
    DatasetMixtureConfig,
    DPOConfig,
    GRPOConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_dataset,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)
from megalign.errors import UserError


@dataclass
class TheirArguments(trl.ScriptArguments):
    """A script's own arguments on top of TRL's."""

    answer: str = field(default="42", metadata={"help": "What to say."})
    names: list[str] | None = None
    mode: Literal["fast", "slow"] = "fast"
    verbose: bool = True


@dataclass
class OurArguments(ScriptArguments):
    """The same with the import changed."""

    answer: str = field(default="42", metadata={"help": "What to say."})
    names: list[str] | None = None
    mode: Literal["fast", "slow"] = "fast"
    verbose: bool = True


WORDS = [
    *("--dataset_name", "rows.jsonl", "--dataset_streaming", "--answer", "6 * 7", "--names", "a", "b"),
    *("--mode", "slow", "--no_verbose", "--model_name_or_path", "m"),
]
TEXT = "dataset_test_split: held_out\nanswer: from the file\nverbose: false\nenv: {MEGALIGN_TEST_ENV: 3}\n"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("MEGALIGN_TEST_ENV", "0")


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(TEXT)
    return str(tmp_path / "run.yaml")


def test_words_and_file_fill_the_dataclasses_as_trls_parser_does(file, monkeypatch):
    theirs = trl.TrlParser((TheirArguments, trl.ModelConfig)).parse_args_and_config([*WORDS, "--config", file])
    assert sys.modules["os"].environ["MEGALIGN_TEST_ENV"] == "3"
    monkeypatch.setenv("MEGALIGN_TEST_ENV", "0")
    ours = TrlParser((OurArguments, ModelConfig)).parse_args_and_config([*WORDS, "--config", file])
    assert sys.modules["os"].environ["MEGALIGN_TEST_ENV"] == "3"
    for their, our in zip(theirs, ours, strict=True):
        # What is no field of ours reads as the value that asks for nothing, which is TRL's default.
        assert {name: getattr(our, name) for name in dataclasses.asdict(their)} == dataclasses.asdict(their)


def test_a_field_of_several_classes_is_given_to_each(file):
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--learning_rate", "1e-5", "--dtype", "bfloat16"]
    script, args, model = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config(words)
    assert script.dataset_name == args.dataset_name == "d"
    assert model.model_name_or_path == args.model_name_or_path == "m"
    assert (args.learning_rate, model.dtype) == (1e-5, "bfloat16")


def test_a_name_that_one_class_has_and_another_refuses_is_a_field(tmp_path):
    (tmp_path / "run.yaml").write_text("datasets: [{path: a.jsonl, fraction: 0.5}, {path: b.jsonl, fraction: 1}]\n")
    words = ["--config", str(tmp_path / "run.yaml")]
    args, mixture = TrlParser((SFTConfig, DatasetMixtureConfig)).parse_args_and_config(words)
    assert mixture.datasets == [DatasetConfig(path="a.jsonl", fraction=0.5), DatasetConfig(path="b.jsonl", fraction=1)]
    assert args == SFTConfig()
    with pytest.raises(UserError, match="datasets=.* is refused: .*dataset_weights"):
        TrlParser(SFTConfig).parse_args_and_config(words)


@pytest.mark.parametrize(
    "words, part",
    [
        (["--learning_rte", "1"], "learning_rte is not a field of OurArguments or SFTConfig; did you mean learning_r"),
        (["--use_peft"], "use_peft=True is refused"),
        (["--mode", "middling"], "mode='middling' is unknown; legal: 'fast', 'slow'"),
        (["--verbose", "perhaps"], "verbose='perhaps' must be True or False"),
        (["--max_seq_length", "8"], "its name is max_length"),
        (["--ignore_bias_buffers"], "ignore_bias_buffers=True is refused"),
    ],
)
def test_a_mistake_is_named(words, part):
    with pytest.raises(UserError) as caught:
        TrlParser((OurArguments, SFTConfig)).parse_args_and_config(words)
    assert part in str(caught.value)


@dataclass
class Needs:
    """A script's dataclass that is none of ours."""

    place: str
    number: int = 3
    anything: Any = None


def test_a_field_without_a_default_is_needed():
    with pytest.raises(UserError, match="place is not given, which Needs needs; give --place"):
        TrlParser(Needs).parse_args_and_config([])
    assert TrlParser(Needs).parse_args_and_config(["--place", "here", "--number", "4", "--anything", "[1, a]"]) == (
        Needs("here", 4, [1, "a"]),
    )
    with pytest.raises(UserError, match="number='four' must be a whole number"):
        TrlParser(Needs).parse_args_and_config(["--place", "here", "--number", "four"])


def test_remaining_strings_are_returned_as_trl_returns_them(tmp_path):
    (tmp_path / "run.yaml").write_text("number: 5\nbogus: 1\n")
    words = ["--place", "here", "--config", str(tmp_path / "run.yaml"), "--extra", "two", "words"]
    for separate in (False, True):
        asked = {"return_remaining_strings": True, "separate_remaining_strings": separate}
        theirs = trl.TrlParser(Needs).parse_args_and_config(list(words), **asked)
        assert TrlParser(Needs).parse_args_and_config(words, **asked) == theirs
    known = words[:4]
    assert TrlParser(Needs).parse_args_and_config(known, fail_with_unknown_args=False) == (Needs("here", 5),)
    with pytest.raises(UserError, match="bogus is not a field of Needs"):
        TrlParser(Needs).parse_args_and_config(known)


def test_help_lists_the_fields_of_every_class_and_ends(capsys):
    with pytest.raises(SystemExit) as caught:
        TrlParser((OurArguments, DPOConfig, Needs), prog="train.py").parse_args_and_config(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and printed.startswith("usage: train.py ")
    assert "  --answer <text> ['42']  What to say." in printed and "  --place <text> [required]" in printed
    assert printed.count("  --dataset_name ") == 1 and "  --discopop_tau <a number> [0.05]  Temp" in printed


# --- the model


def test_fields_of_adapters_and_quantization_ask_for_nothing_or_are_refused():
    args = ModelConfig(lora_r=16, use_peft=False, load_in_4bit=False, dtype="bfloat16", model_revision="main")
    assert (args.use_peft, args.lora_r, args.load_in_8bit, args.attn_implementation) == (False, 16, False, None)
    assert get_peft_config(args) is get_quantization_config(args) is get_kbit_device_map() is None
    for name, value in {"use_peft": True, "load_in_4bit": True, "dtype": "float16", "lora_r": 8}.items():
        with pytest.raises(UserError, match=name):
            ModelConfig(**{name: value})
    with pytest.raises(UserError, match="use_peft=True"):
        get_peft_config(trl.ModelConfig(use_peft=True))
    with pytest.raises(UserError, match="load_in_4bit"):
        get_quantization_config(trl.ModelConfig(load_in_8bit=True))


@pytest.mark.parametrize("theirs", dataclasses.fields(trl.ModelConfig), ids=lambda one: one.name)
def test_every_field_of_trls_model_config_reads_as_trls_default(theirs):
    assert getattr(ModelConfig(), theirs.name) == theirs.default


# --- datasets


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, str]:
    for name, count in (("a", 10), ("b", 4)):
        lines = [json.dumps({"text": f"{name}{number}", "number": number}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}


def as_json(path: str, **more: Any) -> dict[str, Any]:
    return {"path": "json", "data_files": path, **more}


@pytest.mark.parametrize("fractions", [(None, None), (0.5, 0.5), (3, 1), (0.1, 0.9)])
def test_a_mixture_has_the_rows_that_trls_has(rows, fractions):
    datasets = [as_json(rows["ab"[n]], fraction=share, columns=["text"]) for n, share in enumerate(fractions)]
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=[dict(one) for one in datasets]))
    ours = get_dataset(DatasetMixtureConfig(datasets=datasets))
    assert list(ours) == list(theirs) == ["train"]
    assert ours["train"].to_list() == theirs["train"].to_list()


def test_a_file_is_a_path_of_its_own_and_streams_are_read_as_they_are_needed(rows):
    mixture = {"datasets": [{"path": rows["a"]}, {"path": rows["b"]}]}
    whole = get_dataset(DatasetMixtureConfig(**mixture))["train"]
    assert whole["text"] == [f"a{number}" for number in range(10)] + [f"b{number}" for number in range(4)]
    stream = get_dataset(DatasetMixtureConfig(**mixture, streaming=True))["train"]
    assert [row["text"] for row in stream] == list(whole["text"]) and not hasattr(stream, "__len__")


@pytest.mark.parametrize("size, count", [(0.25, 4), (3, 3)])
def test_every_rank_finds_the_same_rows_in_the_test_split(rows, size, count):
    mixture = DatasetMixtureConfig(datasets=[{"path": rows["a"]}, {"path": rows["b"]}], test_split_size=size)
    first, again = get_dataset(mixture), get_dataset(mixture)
    assert len(first["test"]) == count and len(first["train"]) == 14 - count
    assert first["test"].to_list() == again["test"].to_list()


@pytest.mark.parametrize(
    "mixture, part",
    [
        ({}, "datasets names no dataset"),
        ({"datasets": [{}]}, "has no path"),
        ({"datasets": [{"path": "a", "fractoin": 1}]}, "did you mean fraction"),
        ({"datasets": [{"path": "{a}", "fraction": 1}, {"path": "{b}"}]}, "fraction must be given for all"),
        ({"datasets": [{"path": "{a}", "fraction": 1}], "streaming": True}, "fraction must be given for all"),
        ({"datasets": [{"path": "{a}"}], "streaming": True, "test_split_size": 0.5}, "test_split_size needs whole"),
        ({"datasets": [{"path": "./none.jsonl"}]}, "path='./none.jsonl' does not exist"),
        ({"datasets": [{"path": "json", "data_files": "./none.jsonl"}]}, "cannot be read"),
    ],
)
def test_a_mistaken_mixture_is_named(rows, mixture, part):
    filled = json.loads(json.dumps(mixture).replace("{a}", rows["a"]).replace("{b}", rows["b"]))
    with pytest.raises(UserError) as caught:
        get_dataset(DatasetMixtureConfig(**filled))
    assert part in str(caught.value)


def test_an_empty_file_of_a_mixture_is_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(tmp_path / "empty.jsonl")}])
    with pytest.raises(UserError, match="empty.jsonl'} cannot be read: it holds no rows"):
        get_dataset(mixture)


# --- TRL's own scripts, their import changed


class Constructed(Exception):  # noqa: N818  it ends the script where a trainer would begin to work
    """What a script gives to its trainer."""


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "grpo", "rloo"])
def test_a_script_of_trl_reaches_its_trainer_with_a_valid_config(name, rows, monkeypatch):
    source = Path(trl.__file__).parent / "scripts" / f"{name}.py"
    # dataclasses look their module up.
    script = types.ModuleType(f"script_{name}")
    monkeypatch.setitem(sys.modules, script.__name__, script)
    exec(source.read_text().replace("from trl", "from megalign"), vars(script))
    (trainer,) = [word for word in megalign.__all__ if word.lower() == f"{name}trainer"]

    def construct(**given: Any) -> None:
        raise Constructed(given)

    monkeypatch.setitem(vars(megalign), trainer, construct)
    words = [*("--model_name_or_path", "m", "--output_dir", "out", "--learning_rate", "1e-5", "--max_steps", "2")]
    words += ["--dataset_name", str(Path(rows["a"]).parent), "--dtype", "bfloat16"]
    words += ["--reward_funcs", "think_format_reward"] if name in ("grpo", "rloo") else []
    with pytest.raises(Constructed) as caught:
        script.main(*script.make_parser().parse_args_and_config(words))
    (given,) = caught.value.args
    args = given["args"]
    args.validate(8)
    assert type(args) is getattr(megalign, trainer.replace("Trainer", "Config"))
    assert (args.learning_rate, args.max_steps, args.output_dir, args.bf16) == (1e-5, 2, "out", True)
    assert given["model"] == "m" and len(given["train_dataset"]) == 14 and given["eval_dataset"] is None
    assert given["peft_config"] is given["quantization_config"] is None
    if name in ("grpo", "rloo"):
        assert given["reward_funcs"] == [__import__("megalign.rewards").rewards.think_format_reward]
