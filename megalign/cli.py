"""`megalign {sft,grpo} --config run.yaml --field value`: reads the options, runs the trainer, reports errors.

Torch is imported only after every option has been understood.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalign import launch
from megalign.config import GRPOConfig, SFTConfig
from megalign.config.base import Config, default_of, docs, hints, specs, unknown_name
from megalign.config.values import asked_for, from_yaml, kinds, load_yaml, parse
from megalign.errors import UserError

if TYPE_CHECKING:
    import datasets

COMMANDS: dict[str, type[Config]] = {"sft": SFTConfig, "grpo": GRPOConfig}
SUMMARIES = {
    "sft": "supervised fine-tuning on text, prompt-completion pairs, messages or tokenized rows",
    "grpo": "reinforcement learning: group relative policy optimization with vLLM",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line about the user's mistake."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        launch.report_error(str(error))
    except RuntimeError:
        # A peer that left takes its connections with it; what gloo or NCCL say then is not news.
        if not launch.another_rank_reported():
            raise
    else:
        return 0
    if launch.default_store() is not None:
        launch.end_at_once(launch.EXIT_USER_ERROR)
    return launch.EXIT_USER_ERROR


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(top_level_help())
        return
    command = argv.pop(0)
    if command == "--version":
        print(importlib.import_module("megalign").__version__)
        return
    if command not in COMMANDS:
        raise UserError(f"{command!r} is not a command; use {' or '.join(COMMANDS)}")
    if "-h" in argv or "--help" in argv:
        print(command_help(command))
        return
    args = parse_arguments(COMMANDS[command], argv)
    # What Megatron falls back to without Transformer Engine and Apex is by design here; said once for each module and
    # rank, it would bury the progress bar.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    args.validate(launch.prepare_environment())
    {"sft": run_sft, "grpo": run_grpo}[command](args)


def run_sft(args: SFTConfig) -> None:
    """Trains as the options say; train() leaves the model in output_dir."""
    model, train_dataset, eval_dataset = _inputs(args)
    from megalign.trainers.sft import SFTTrainer

    trainer = SFTTrainer(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    _train(trainer, args)


def run_grpo(args: GRPOConfig) -> None:
    """Trains as the options say; train() leaves the model in output_dir."""
    if not args.reward_funcs:
        raise UserError("reward_funcs is not given; name one or more, e.g. --reward_funcs accuracy_reward")
    from megalign.rollout.reward_functions import resolve

    reward_funcs = [resolve(name) for name in args.reward_funcs]
    model, train_dataset, eval_dataset = _inputs(args)
    from megalign.trainers.grpo import GRPOTrainer

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    _train(trainer, args)


def _train(trainer: Any, args: SFTConfig | GRPOConfig) -> None:
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    import torch.distributed

    # vLLM's exit handler (0.32) ends its own groups and then the default one, and fails where that is gone already.
    if torch.distributed.is_initialized() and "vllm" not in sys.modules:
        torch.distributed.destroy_process_group()


def _inputs(args: SFTConfig | GRPOConfig) -> tuple[str, datasets.Dataset, datasets.Dataset | None]:
    """The model's name, the training rows, and the evaluation rows where they are asked for."""
    for name, example in (("model_name_or_path", "path/to/model"), ("dataset_name", "rows.jsonl")):
        if getattr(args, name) is None:
            raise UserError(f"{name} is not given; give it, e.g. --{name} {example}")
    from megalign.data.datasets import load_split

    train_dataset = load_split(args, args.dataset_train_split)
    eval_dataset = load_split(args, args.dataset_test_split) if args.evaluates else None
    return args.model_name_or_path, train_dataset, eval_dataset


# --- options


def parse_arguments(cls: type[Config], argv: list[str]) -> Any:
    """The config of `--config FILE` and `--field value` words; words win over the file."""
    values: dict[str, Any] = {}
    given = _words_by_name(cls, argv)
    if "config" in given:
        (path, *more) = given.pop("config") or [""]
        if more or not path:
            raise UserError(f"--config takes one YAML file, not {' '.join([path, *more])!r}; give --config run.yaml")
        values = read_yaml(cls, path)
    for name, words in given.items():
        values[name] = _value_of_words(cls, name, words)
    return cls(**values)


def _words_by_name(cls: type[Config], argv: list[str]) -> dict[str, list[str]]:
    """`--name word ...` and `--name=word` with - and _ alike -> name: words; names are checked here."""
    given: dict[str, list[str]] = {}
    name = None
    for word in argv:
        if not word.startswith("--"):
            if name is None:
                raise UserError(f"{word!r} stands before any --field; write --field {word}")
            given[name].append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name != "config" and name not in specs(cls) and name not in cls.refused:
            raise unknown_name(cls, name, others=("config",))
        given[name] = [value] if equals else []
    return given


def _value_of_words(cls: type[Config], name: str, words: list[str]) -> Any:
    """What the words after --name mean; none is a bare boolean."""
    if name in cls.refused:
        return from_yaml(" ".join(words)) if words else True
    annotation = hints(cls)[name]
    members, _ = kinds(annotation)
    if not words:
        if bool in members:
            return True
        raise UserError(f"--{name} has no value; it must be {asked_for(annotation)}")
    takes_list = any(member in members for member in (list[str], list[float]))
    if len(words) > 1 and not takes_list:
        raise UserError(f"--{name} {' '.join(words)}: one value is wanted, {asked_for(annotation)}; quote it if it is")
    if len(words) == 1:
        return parse(name, annotation, words[0])
    return [item for word in words for item in parse(name, annotation, word)]


def read_yaml(cls: type[Config], path: str) -> dict[str, Any]:
    """The fields of a flat YAML file; its `env` mapping goes into the environment."""
    import yaml

    try:
        loaded = load_yaml(Path(path).read_text()) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}; write `field: value` lines") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"--config {path} holds a {type(loaded).__name__}, not fields; write `field: value` lines")
    _set_environment(path, loaded.get("env") or {})
    values = {str(key).replace("-", "_"): value for key, value in loaded.items() if key != "env"}
    for name, value in values.items():
        if name not in specs(cls) and name not in cls.refused:
            raise UserError(f"{unknown_name(cls, name, others=('env',))} (in {path})")
        # "1e-5" in quotes, or None, means the same as on the command line.
        if isinstance(value, str) and name in specs(cls):
            values[name] = parse(name, hints(cls)[name], value)
    return values


def _set_environment(path: str, variables: Any) -> None:
    if not isinstance(variables, Mapping):
        raise UserError(
            f"env: {variables!r} in {path} must be a mapping of variables to values; write env: {{NAME: 1}}"
        )
    os.environ.update({str(name): str(value) for name, value in variables.items()})


# --- help


def top_level_help() -> str:
    """The commands."""
    lines = [f"  {command:6}{SUMMARIES[command]}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: python -m megalign COMMAND --config run.yaml --field value ...",
            "       torchrun --nproc_per_node N -m megalign COMMAND ...   (or: srun python -m megalign COMMAND ...)",
            "",
            "commands:",
            *lines,
            "",
            "`megalign COMMAND --help` lists its fields.",
        ]
    )


def command_help(command: str) -> str:
    """One line a field: two spaces, --name, what it takes, its default and its doc; under its class's
    heading."""
    cls = COMMANDS[command]
    known, texts, annotations = specs(cls), docs(cls), hints(cls)
    lines = [
        f"usage: megalign {command} [--config run.yaml] [--field value ...]",
        "",
        "--a_b is --a-b. Booleans may stand alone, lists take several words, mappings are JSON or YAML.",
        "  --config FILE  YAML file of fields; the command line wins, and env: sets environment variables",
    ]
    # A field stands where it was declared last: learning_rate's default is the algorithm's.
    owners = [owner for owner in cls.__mro__ if issubclass(owner, Config) and owner is not Config]
    shown: set[str] = set()
    for owner in owners:
        lines += ["", inspect.getdoc(owner)]
        names = [name for name in owner.__annotations__ if name in known and name not in shown]
        shown.update(names)
        lines += [_field_line(known[name], annotations[name], texts[name]) for name in names]
    return "\n".join(lines)


def _field_line(spec: Field, annotation: Any, text: str) -> str:
    legal = ",".join(str(choice) for choice in spec.metadata["choices"]) if spec.metadata else ""
    takes = "{" + legal + "}" if legal else asked_for(annotation)
    return f"  --{spec.name} <{takes}> [{default_of(spec)!r}]  {text}"
