"""A user's mistake is one line for the whole job, that names the value, the rule and the way out; every rank ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.jobs.inputs import save_model, sums, write_rows
from tests.jobs.mistaken import no_vllm, random_rollout, start_mistaken
from tests.jobs.start import run, torchrun

REWARDS = """
import os, time

def fine(completions, **kwargs):
    return [float(len(text)) for text in completions]

def raises(completions, **kwargs):
    if os.environ["RANK"] == "1":
        raise KeyError("no such answer")
    return [0.0] * len(completions)

def hangs(completions, **kwargs):
    while os.environ["RANK"] == "1":
        time.sleep(1)
    return [0.0] * len(completions)

def too_few(completions, **kwargs):
    return [0.0] * (len(completions) - 1)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("somewhere")
    save_model(path / "model")
    save_model(path / "odd", hidden_size=36, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=3)
    shutil.copytree(path / "model", path / "torn")
    weights = load_file(path / "torn" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "torn" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(path / "model", path / "mamba")
    config = json.loads((path / "mamba" / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (path / "mamba" / "config.json").write_text(json.dumps(config))
    rows = sums(8)
    write_rows(path / "rows.jsonl", rows)
    write_rows(path / "gap.jsonl", [*rows[:5], {"prompt": "1 + 1 = "}, *rows[6:]])
    write_rows(path / "renamed.jsonl", [{"question": row["prompt"]} for row in rows])
    write_rows(path / "long.jsonl", [*rows[:3], {"prompt": "1 + " * 99, "answer": 99}])
    (path / "rewards.py").write_text(REWARDS)
    return path


def given(words: list[object], *changes: object) -> list[object]:
    """A command's words with other values, or more: a flag stands on the command line once."""
    command, *pairs = words
    flags = dict(zip(pairs[::2], pairs[1::2], strict=True)) | dict(zip(changes[::2], changes[1::2], strict=True))
    return [command, *(word for pair in flags.items() for word in pair)]


TP2 = ["--tensor_model_parallel_size", 2]
PP2 = ["--pipeline_model_parallel_size", 2]
SFT = ["sft", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--output_dir", "out", "--max_steps", 1]
GRPO = ["grpo", *SFT[1:], "--num_generations", 2, "--per_device_train_batch_size", 2, "--max_completion_length", 6]
SCORED = given(GRPO, "--reward_funcs", "rewards.py:fine")
MISTAKES = {
    "unknown key": (given(SFT, "--learning_rte", 1), ["learning_rte is not a field", "did you mean learning_rate?"]),
    "world by TP x PP": (
        given(SFT, *TP2, *PP2),
        ["world size 2", "tensor_model_parallel_size 2 * pipeline_model_parallel_size 2", "a multiple of 4"],
    ),
    "heads by TP": (
        given(SFT, *TP2, "--model_name_or_path", "odd"),
        ["num_attention_heads 3", "tensor_model_parallel_size 2", "one of [1, 3]"],
    ),
    "layers by PP": (
        given(SFT, *PP2, "--model_name_or_path", "odd"),
        ["num_hidden_layers 3", "pipeline_model_parallel_size 2", "that divides it"],
    ),
    "generations by batch": (
        given(SCORED, "--num_generations", 3),
        ["generation_batch_size 4", "multiple of num_generations 3", "change one of them"],
    ),
    "missing model directory": (
        given(SFT, "--model_name_or_path", "no/such/model"),
        ["model directory no/such/model does not exist", "give a Hugging Face directory"],
    ),
    "missing tensor": (
        given(SFT, "--model_name_or_path", "torn"),
        ["torn does not fit its config.json", "missing tensors: model.layers.1.mlp.up_proj.weight"],
    ),
    "unsupported architecture": (
        given(SFT, "--model_name_or_path", "mamba"),
        ["architecture 'MambaForCausalLM' is not supported", "LlamaForCausalLM"],
    ),
    "row without its completion": (
        given(SFT, "--dataset_name", "gap.jsonl"),
        ["dataset row 5: it has no 'completion'", "fill it in or drop the row"],
    ),
    "rows without the column": (
        given(SFT, "--dataset_name", "renamed.jsonl"),
        ["dataset row 0: its columns are 'question'", "SFT needs 'text'"],
    ),
    "prompts without the column": (
        given(SCORED, "--dataset_name", "renamed.jsonl"),
        ["dataset row 0: it has no 'prompt', only 'question'", "add or rename the column"],
    ),
    "missing dataset file": (
        given(SFT, "--dataset_name", "nowhere.jsonl"),
        ["dataset_name='nowhere.jsonl' does not exist", "give a .jsonl or .parquet file"],
    ),
    "prompt too long": (
        given(SCORED, "--dataset_name", "long.jsonl"),
        ["dataset row 3: its prompt has", "the limit is 122", "max_completion_length"],
    ),
    "output directory that cannot be": (
        given(SFT, "--output_dir", "rows.jsonl/out"),
        ["output_dir='rows.jsonl/out' cannot be made (Not a directory)", "choose another"],
    ),
    "no reward function of that name": (
        given(GRPO, "--reward_funcs", "rewards.py:fin"),
        ["reward function 'rewards.py:fin'", "did you mean fine?"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_every_rank_with_one_line(name: str, here: Path) -> None:
    words, parts = MISTAKES[name]
    line = start_mistaken(words, here).line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("raises", ["it raised KeyError: 'no such answer'", "rewards.py:9", "must return a number or None"]),
        ("hangs", ["did not answer for completions ", "within reward_timeout 1 s", "raise reward_timeout"]),
        ("too_few", ["it returned 1 values for 2 completions", "return one for each"]),
    ],
)
def test_a_reward_functions_fault_on_one_rank_ends_all(function: str, parts: list[str], here: Path) -> None:
    patience = ["--reward_timeout", 1] if function == "hangs" else []
    words = [*SCORED, f"rewards.py:{function}", *patience]
    line = start_mistaken(words, here, first=random_rollout).line
    assert line.startswith(f"megalign: error: reward function '{function}'")
    assert all(part in line for part in parts), line


def test_what_only_one_rank_meets_ends_the_others_too(here: Path) -> None:
    (here / "taken" / "model.safetensors").mkdir(parents=True)  # rank 0 writes the model, the others wait for it
    line = start_mistaken(given(SFT, *PP2, "--output_dir", "taken", "--save_strategy", "no"), here).line
    assert line.startswith("megalign: error: cannot write the model to taken (") and "choose another directory" in line


def test_a_machine_without_vllm_is_told_how_to_get_it(here: Path) -> None:
    line = start_mistaken(SCORED, here, first=no_vllm).line
    assert "vLLM is not installed" in line and "tools/install.sh" in line


SCRIPT = """
import json
from megalign import SFTConfig, SFTTrainer

rows = [json.loads(line) for line in open("gap.jsonl")]
SFTTrainer("model", SFTConfig(output_dir="out"), train_dataset=rows).train()
"""


def test_a_mistake_in_a_script_is_one_line_too(here: Path) -> None:
    (here / "train.py").write_text(SCRIPT)
    ended = run(torchrun(2, "train.py"), here)
    assert ended.status != 0 and 2 in ended.rank_statuses, ended.stderr
    (line,) = ended.error_lines
    assert line.startswith("megalign: error: dataset row 5: it has no 'completion'")
    assert "megalign/" not in ended.stderr and 'train.py", line' not in ended.stderr, ended.stderr
