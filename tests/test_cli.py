"""The command line: what it reads, what it refuses, what it imports."""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

import megalign
from megalign.cli import COMMANDS, command_help, main, parse_arguments, top_level_help
from megalign.config import DPOConfig, GRPOConfig, SFTConfig
from megalign.config.base import docs, specs
from megalign.errors import UserError


def sft(*words: str) -> SFTConfig:
    return parse_arguments(SFTConfig, list(words))


def grpo(*words: str) -> GRPOConfig:
    return parse_arguments(GRPOConfig, list(words))


def run(*words: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megalign", *words]
    paths = os.pathsep.join([os.path.dirname(os.path.dirname(megalign.__file__)), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        env=dict(os.environ, PYTHONPATH=paths, **environ),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_dashes_underscores_and_equals_are_the_same():
    expected = SFTConfig(per_device_train_batch_size=2, learning_rate=1e-4)
    assert sft("--per_device_train_batch_size", "2", "--learning_rate", "1e-4") == expected
    assert sft("--per-device-train-batch-size=2", "--learning-rate=1e-4") == expected


@pytest.mark.parametrize(
    "words, value", [(["--packing"], True), (["--packing", "True"], True), (["--packing", "false"], False)]
)
def test_booleans_stand_alone_or_say_it(words, value):
    assert sft(*words, "--max_steps", "-1").packing is value


def test_lists_mappings_and_none():
    args = grpo(
        *("--reward_funcs", "accuracy_reward", "my.module.func"),
        *("--reward_weights", "1", "0.5"),
        *("--generation_kwargs", '{"stop": ["\\n"], "presence_penalty": 0.1}'),
        *("--vllm_importance_sampling_clip_max", "None"),
        *("--report_to", "[tensorboard, wandb]"),
        *("--scale_rewards", "False"),
    )
    assert args.reward_funcs == ["accuracy_reward", "my.module.func"]
    assert args.reward_weights == [1.0, 0.5]
    assert args.generation_kwargs == {"stop": ["\n"], "presence_penalty": 0.1}
    assert args.vllm_importance_sampling_clip_max is None
    assert args.report_to == ["tensorboard", "wandb"]
    assert args.scale_rewards == "none"


def test_several_datasets_and_losses_are_several_words():
    args = parse_arguments(
        DPOConfig,
        [
            *("--dataset_name", "a.jsonl", "b.jsonl", "--dataset_weights", "1", "2"),
            *("--loss_type", "sigmoid", "sft", "--loss_weights", "[1, 0.5]"),
        ],
    )
    assert (args.dataset_name, args.dataset_weights) == (["a.jsonl", "b.jsonl"], [1.0, 2.0])
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    assert sft("--dataset_name", "[a.jsonl, b.jsonl]").dataset_name == ["a.jsonl", "b.jsonl"]
    assert parse_arguments(DPOConfig, ["--loss_type", "ipo"]).loss_type == ["ipo"]


def test_no_before_a_boolean_means_false_as_in_trl():
    assert sft("--no_shuffle_dataset").shuffle_dataset is False
    assert sft("--no-gradient-checkpointing").gradient_checkpointing is False
    assert parse_arguments(DPOConfig, ["--no_remove_unused_columns"]) == DPOConfig()
    with pytest.raises(UserError, match="no_max_steps is not a field"):
        sft("--no_max_steps")


def test_text_is_not_taken_for_anything_else():
    args = sft("--model_name_or_path", "1", "--run_name", "true", "--dataset_name", "a b.jsonl")
    assert (args.model_name_or_path, args.run_name, args.dataset_name) == ("1", "true", "a b.jsonl")


def test_the_command_line_wins_over_yaml_and_env_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGALIGN_TEST_ENV", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-5\nweight_decay: '1e-2'\nmax_steps: 3\nbf16: false\nreport-to: tensorboard\n"
        "eval_steps: None\nlr_scheduler_kwargs: {min_lr: 1e-7}\nenv: {MEGALIGN_TEST_ENV: 1}\n"
    )
    try:
        args = sft("--max_steps", "5", "--config", str(file))
        assert os.environ["MEGALIGN_TEST_ENV"] == "1"
    finally:
        os.environ.pop("MEGALIGN_TEST_ENV", None)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-7} and args.weight_decay == 1e-2 and args.eval_steps is None
    assert (args.learning_rate, args.max_steps, args.bf16, args.report_to) == (
        1e-5,
        5,
        False,
        ["tensorboard"],
    )


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--learning_rte", "1"], ["learning_rte", "learning_rate"]),
        (["--learning_rate", "fast"], ["learning_rate='fast'", "a number"]),
        (["--max_steps", "2.5"], ["max_steps='2.5'", "a whole number"]),
        (["--max_steps"], ["--max_steps has no value"]),
        (["--max_steps", "1", "2"], ["--max_steps 1 2", "one value"]),
        (["--packing", "maybe"], ["packing='maybe'", "True or False"]),
        (["--lr_scheduler_kwargs", "x"], ["lr_scheduler_kwargs='x'", "a mapping"]),
        (["run.yaml"], ["'run.yaml' stands before"]),
        (["--fp16"], ["fp16=True is refused", "nearest: bf16"]),
        (["--use-peft"], ["use_peft=True is refused"]),
        (["--optim", "sgd"], ["optim='sgd' is refused"]),
        (["--context_parallel_size", "0"], ["context_parallel_size=0", "at least 1"]),
        (["--max_steps", "1", "--max-steps=2"], ["--max_steps is given twice"]),
        (["--packing", "--no_packing"], ["--packing is given twice"]),
        (["--lr_scheduler_kwargs", "{min_lr: 1, min_lr: 2}"], ["'min_lr' is given twice"]),
        (["--report_to", "none", "--report_to", "tensorboard"], ["--report_to is given twice", "all of its values"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["--config is given twice"]),
        (["--config"], ["--config takes one YAML file"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "No such file"]),
    ],
)
def test_a_mistake_is_named(words, parts):
    with pytest.raises(UserError) as caught:
        sft(*words)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("learning_rte: 1", ["learning_rte", "learning_rate", "run.yaml"]),
        ("learning_rate: fast", ["learning_rate='fast'"]),
        ("max_steps: [1]", ["max_steps=[1]"]),
        ("packing: 1", ["packing=1"]),
        ("deepspeed: ds.json", ["deepspeed='ds.json' is refused"]),
        ("- 1", ["holds a list"]),
        ("a: [", ["is not YAML"]),
        ("env: 1", ["env: 1"]),
        ("max_steps: 1\npacking: true\nmax_steps: 2", ["run.yaml", "'max_steps' is given twice"]),
        ("learning_rate: 1\nlearning-rate: 2", ["run.yaml", "learning_rate is given twice", "with - and with _"]),
        ("env: {A: 1, B: 2, A: 3}", ["run.yaml", "'A' is given twice"]),
    ],
)
def test_a_mistake_in_yaml_is_named(tmp_path, text, parts):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        sft("--config", str(file))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_yaml_key_that_is_merged_in_may_be_overridden(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("<<: &base {max_steps: 1, packing: true}\nmax_steps: 2\n")
    args = sft("--config", str(file))
    assert (args.max_steps, args.packing) == (2, True)


def test_off_values_of_refused_fields_pass():
    assert sft("--fp16", "False", "--deepspeed", "None", "--optim", "adamw_torch") == SFTConfig()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_line_with_a_doc_for_every_field(command):
    lines = command_help(command).splitlines()
    config = COMMANDS[command].config
    for name in specs(config):
        (line,) = [line for line in lines if line.startswith(f"  --{name} ")]
        assert line.endswith(docs(config)[name])
    assert f"  {command:8}{COMMANDS[command].summary}" in top_level_help().splitlines()


def test_help_says_whether_one_of_the_choices_is_taken_or_several():
    taken = {line.split()[0]: line for line in command_help("sft").splitlines() if line.startswith("  --")}
    assert "<{full,selective}> [None]" in taken["--recompute_granularity"]
    assert "<a list of {core_attn,layernorm," in taken["--recompute_modules"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_finds_its_trainer_whose_config_is_its_own(command):
    module, name = COMMANDS[command].trainer.split(":")
    trainer = getattr(importlib.import_module(f"megalign.trainers.{module}"), name)
    assert trainer.config_class is COMMANDS[command].config
    assert getattr(megalign, name) is trainer
    assert getattr(megalign, name.replace("Trainer", "Config")) is COMMANDS[command].config


@pytest.mark.parametrize(
    "words", [*([command, "--help"] for command in COMMANDS), ["sft", "-h"], ["--help"], ["sft", "--learning_rte", "1"]]
)
def test_help_and_wrong_flags_answer_without_torch_or_transformers(words):
    code = (
        "import sys; from megalign.cli import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'torch', 'transformers', 'megatron', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    status = 2 if "--learning_rte" in words else 0
    assert ran.stdout.splitlines()[-1] == f"{status} []", ran.stderr


def test_help_takes_well_under_a_second():
    # By what it computes, beside what reading YAML does: the clock would tell of the machine's other processes.
    def seconds(act: Callable[[], object]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        act()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    read_yaml = partial(subprocess.run, [sys.executable, "-c", "import yaml"], check=True, timeout=60)
    least = min(seconds(read_yaml) for _ in range(3))
    assert min(seconds(lambda: run("ppo", "--help")) for _ in range(3)) < 6 * least


def test_a_mistake_is_one_line_and_status_2():
    ran = run("grpo", "--learning_rte", "1")
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "megalign: error: learning_rte is not a field of GRPOConfig; did you mean learning_rate?\n"


def test_a_world_that_does_not_divide_is_one_line():
    ran = run("sft", "--tensor_model_parallel_size", "2", RANK="0", WORLD_SIZE="1")
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("megalign: error: world size 1 must be a multiple of tensor_model_parallel_size 2")


@pytest.mark.parametrize(
    "words, missing",
    [
        (["sft"], "model_name_or_path"),
        (["sft", "--model_name_or_path", "m"], "dataset_name"),
        (["grpo"], "reward_funcs"),
        (["rloo"], "reward_funcs"),
        (["grpo", "--reward_funcs", "a.b"], "model_name_or_path"),
        (["ppo"], "reward_funcs or reward_model_path"),
        (["ppo", "--reward_model_path", "m"], "model_name_or_path or sft_model_path"),
        (["ppo", "--reward_model_path", "m", "--sft_model_path", "m"], "dataset_name"),
        (["dpo", "--model_name_or_path", "m"], "dataset_name"),
    ],
)
def test_what_must_be_given_is_named(words, missing, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"megalign: error: {missing} is not given")


def test_an_unknown_command_names_the_known_ones(capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["distillation"]) == 2
    assert "'distillation' is not a command; use one of sft, reward, dpo, kto, orpo, ppo," in capsys.readouterr().err


def test_the_package_is_lazy():
    code = (
        "import sys, megalign; megalign.GRPOConfig; megalign.UserError; megalign.__version__; megalign.TrlParser;"
        "assert 'torch' not in sys.modules;"
        "import megalign.algos; assert not {'megatron', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="GRPOConfig"):
        megalign.BCOTrainer  # noqa: B018
