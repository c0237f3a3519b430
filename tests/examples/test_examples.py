"""A YAML file and a script for each trainer: they say the same, their rows become tokens, and they train."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

import megalign
from megalign import cli
from megalign.data.reading import load_split
from megalign.rollout.reward_functions import resolve
from tests.data.tokenizers_made_here import CHATML, make_tokenizer, unmarked
from tests.jobs.start import ROOT
from tests.ranks import run_ranks
from tests.tiny import save_tiny_classifier, save_tiny_model
from tests.trainers.grpo_runs import RandomRollout
from tests.trainers.runs import metric_lines

EXAMPLES = ROOT / "examples"
KINDS = tuple(cli.COMMANDS)
# Fields whose place a constructor's argument takes in a script.
GIVEN = {"model": "model_name_or_path", "reward_model": "reward_model_path"}
VOCABULARY = 420


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the examples are started; a script's hook and cache end with the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def from_yaml(kind: str) -> Any:
    """The config of the file's fields."""
    return cli.parse_arguments(cli.COMMANDS[kind].config, ["--config", f"examples/{kind}.yaml"])


def commands(text: str) -> list[str]:
    """What a comment tells to run, without what it says may be left out."""
    lines = [line.strip("# ") for line in text.splitlines()]
    return [re.sub(r" \[.*?\]", "", line) for line in lines if line.startswith(("python ", "torchrun "))]


# ---- the YAML file and the script of a trainer


class Constructed(Exception):  # noqa: N818  it ends the script where a trainer would begin to work
    """What a script gives to its trainer."""


class Said(NamedTuple):
    """What a script's last command, as its docstring has it, gives to the trainer."""

    args: Any
    given: dict[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        """All fields, those that the constructor was given in place of the config's among them."""
        given = {GIVEN[name]: value for name, value in self.given.items() if name in GIVEN}
        return {**dataclasses.asdict(self.args), **given}


def from_script(kind: str, monkeypatch: pytest.MonkeyPatch) -> Said:
    path = EXAMPLES / f"{kind}.py"
    *_, command = commands(str(ast.get_docstring(ast.parse(path.read_text()))))
    launcher, *words = command.split(f" examples/{kind}.py")
    assert launcher == "torchrun --nproc_per_node 2"

    def construct(**given: Any) -> None:
        raise Constructed(given)

    _, trainer = cli.COMMANDS[kind].trainer.split(":")
    monkeypatch.setitem(vars(megalign), trainer, construct)
    monkeypatch.setattr(sys, "argv", [str(path), *" ".join(words).split()])
    with pytest.raises(Constructed) as caught:
        runpy.run_path(str(path), run_name="__main__")
    (given,) = caught.value.args
    return Said(given.pop("args"), given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_script_says_what_its_yaml_file_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, script = from_yaml(kind), from_script(kind, monkeypatch)
    assert type(script.args) is type(ours)
    elsewhere = ("output_dir", "dataset_name", "reward_funcs")
    expected, found = (
        {name: value for name, value in fields.items() if name not in elsewhere}
        for fields in (dataclasses.asdict(ours), script.fields)
    )
    assert found == expected
    parts = [script.given[name] for name in ("train_dataset", "eval_dataset") if script.given.get(name) is not None]
    rows = [row for part in parts for row in part.to_list()]
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, load_split(ours, "train").to_list()))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_script_has_the_reward_functions_of_its_yaml_file(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = from_script(kind, monkeypatch).given["reward_funcs"]
    mine = [resolve(one) if isinstance(one, str) else one for one in (given if isinstance(given, list) else [given])]
    theirs = [resolve(name) for name in from_yaml(kind).reward_funcs]
    # A module that is read twice has its functions twice.
    identity = [[(str(Path(f.__code__.co_filename).resolve()), f.__name__) for f in side] for side in (mine, theirs)]
    assert identity[0] == identity[1]


def test_no_two_examples_write_to_the_same_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [from_yaml(kind).output_dir for kind in KINDS]
    outputs += [from_script(kind, monkeypatch).args.output_dir for kind in KINDS]
    assert len(set(outputs)) == 2 * len(KINDS)
    assert all(output.startswith("runs/") for output in outputs)  # which git ignores


@pytest.mark.parametrize("kind", KINDS)
def test_a_yaml_file_says_how_to_start_it(kind: str) -> None:
    unpack, *before, start = commands((EXAMPLES / f"{kind}.yaml").read_text())
    args = from_yaml(kind)
    assert unpack == f"python tools/gguf_to_hf.py --output {args.model_name_or_path}"
    assert start == f"torchrun --nproc_per_node 2 -m megalign {kind} --config examples/{kind}.yaml"
    if kind == "ppo":  # a chain: the first one trains what scores in the second
        assert before == [start.replace("ppo", "reward")]
        assert args.reward_model_path == from_yaml("reward").output_dir
    else:
        assert not before


def test_closeness_is_1_at_the_answer_and_falls_with_the_distance() -> None:
    reward = resolve("examples/rloo.py:closeness_reward")
    texts = ["3 + 4 = 7", "It is 8.", "5", "7, or 17", "seven"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions, [7] * 5) == [1, 1 / 2, 1 / 3, 1 / 11, 0]


# ---- rows


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text().splitlines()]


def test_pairs_are_right_against_wrong_on_questions_that_are_trained_on() -> None:
    pairs, sums = rows_of("pairs.jsonl"), rows_of("sums.jsonl")
    answers = {json.dumps(row["prompt"]): row["answer"] for row in sums}
    ends: dict[str, list[int | None]] = {"chosen": [], "rejected": []}
    for row in pairs:
        for side, last in ends.items():
            (message,) = row[side]
            numbers = re.findall(r"\d+", message["content"])
            last.append(int(numbers[-1]) if numbers else None)
    right = [answers[json.dumps(row["prompt"])] for row in pairs]
    assert ends["chosen"] == right
    assert all(wrong != answer for wrong, answer in zip(ends["rejected"], right, strict=True))
    assert len({json.dumps(row) for row in pairs}) == len(pairs) == 96
    assert {json.dumps(row["prompt"]) for row in pairs} == answers.keys()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """ChatML, and words about as long as a large vocabulary's."""
    rows = rows_of("sums.jsonl") + rows_of("pairs.jsonl")
    texts = [message["content"] for row in rows for side in row.values() if isinstance(side, list) for message in side]
    trained = make_tokenizer().train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    trained.chat_template = unmarked(CHATML)
    return trained


@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_tokens_and_none_is_too_long(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    args = from_yaml(kind)
    args.shuffle_dataset = False  # KTO's rows are shuffled as they are prepared
    rows = load_split(args, args.dataset_train_split)
    trainer = SimpleNamespace(
        args=args,
        processing_class=tokenizer,
        architecture=SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=8192),
        rows_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        _pad=tokenizer.pad_token_id,
    )
    _, name = cli.COMMANDS[kind].trainer.split(":")
    prepared = getattr(megalign, name).tokenized(trainer, rows, for_evaluation=False)
    assert len(prepared) == len(rows) * (2 if kind == "kto" else 1)
    texts = {
        "sft": ("input_ids", "completion"),
        "reward": ("rejected_ids", "rejected"),
        "dpo": ("rejected_ids", "rejected"),
        "kto": ("input_ids", "chosen"),
        "orpo": ("chosen_ids", "chosen"),
    }
    ids, side = texts.get(kind, ("prompt_ids", "prompt"))
    whole = tokenizer.decode(prepared[0][ids])
    assert all(message["content"] in whole for message in [*rows[0]["prompt"], *rows[0][side]])


# ---- training


class Inputs(NamedTuple):
    """Tiny models with the vocabulary of the rows."""

    model: str
    judge: str


@pytest.fixture(scope="module")
def inputs(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    path = tmp_path_factory.mktemp("models")
    found = Inputs(
        save_tiny_model("llama", path / "model", vocab_size=VOCABULARY),
        save_tiny_classifier("llama", path / "judge", vocab_size=VOCABULARY, seed=1),
    )
    for one in found:
        tokenizer.save_pretrained(one)
    return found


def train(kind: str, inputs: Inputs, output_dir: str) -> None:
    """The command line in a test rank, which the job must not end; vLLM's stand-in draws random tokens."""
    from megalign.trainers import base, online

    words = ["--model_name_or_path", inputs.model, "--output_dir", output_dir, "--max_steps", "2"]
    words += ["--reward_model_path", inputs.judge] if kind == "ppo" else []
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(io.StringIO()),
        patch.object(online, "VllmEngine", RandomRollout),
        patch.object(base.Trainer, "end"),
    ):
        cli._run([kind, "--config", f"examples/{kind}.yaml", *words, "--disable_tqdm", "True"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_example_trains_on_two_ranks(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    run_ranks(2, train, kind, inputs, str(tmp_path))
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in lines)
    config = json.loads((tmp_path / "config.json").read_text())
    kinds = {True: "LlamaForSequenceClassification", False: "LlamaForCausalLM"}
    assert config["architectures"] == [kinds[kind == "reward"]]
    if kind in ("grpo", "rloo", "ppo"):
        assert (tmp_path / "completions" / "completions_00001.parquet").exists()
