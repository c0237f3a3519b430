"""`megalign COMMAND --config run.yaml --field value`: reads the options, runs the trainer, reports errors.

Torch is imported only after every option has been understood.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megalign import failure, launch, liveness
from megalign.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    LoopConfig,
    ORPOConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
)
from megalign.config.help import SYNTAX, field_lines
from megalign.config.words import Words
from megalign.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Fields of which one must be given, and what to write.
_MODEL = (("model_name_or_path",), "path/to/model")
_SFT_MODEL = (("model_name_or_path", "sft_model_path"), "path/to/model")
_ROWS = (("dataset_name",), "rows.jsonl")
_REWARDS = (("reward_funcs",), "accuracy_reward")
_REWARDS_OR_MODEL = (("reward_funcs", "reward_model_path"), "accuracy_reward")


class Command(NamedTuple):
    """What a command fills in, which trainer it runs, and what it cannot do without."""

    config: type[LoopConfig]
    trainer: str  # module of megalign.trainers:class
    summary: str
    needs: tuple[tuple[tuple[str, ...], str], ...] = (_MODEL, _ROWS)


COMMANDS: dict[str, Command] = {
    "sft": Command(
        SFTConfig,
        "sft:SFTTrainer",
        "supervised fine-tuning on text, prompt-completion pairs, messages or tokenized rows",
    ),
    "reward": Command(RewardConfig, "reward:RewardTrainer", "a reward model, on pairs of chosen and rejected answers"),
    "dpo": Command(DPOConfig, "dpo:DPOTrainer", "direct preference optimization on such pairs"),
    "kto": Command(KTOConfig, "kto:KTOTrainer", "preference optimization on single answers, good or bad"),
    "orpo": Command(ORPOConfig, "orpo:ORPOTrainer", "preference optimization on pairs, without a reference model"),
    "ppo": Command(
        PPOConfig,
        "ppo:PPOTrainer",
        "reinforcement learning: proximal policy optimization with a critic, and vLLM",
        (_REWARDS_OR_MODEL, _SFT_MODEL, _ROWS),
    ),
    "grpo": Command(
        GRPOConfig,
        "grpo:GRPOTrainer",
        "reinforcement learning: group relative policy optimization with vLLM",
        (_REWARDS, _MODEL, _ROWS),
    ),
    "rloo": Command(
        RLOOConfig,
        "rloo:RLOOTrainer",
        "reinforcement learning: each completion against the others of its group, with vLLM",
        (_REWARDS, _MODEL, _ROWS),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line about the user's mistake."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        failure.let_a_death_be_told(error)
        failure.report_error(str(error))
    except RuntimeError as error:
        # A peer that left takes its connections with it; what gloo or NCCL say then is not news.
        if not failure.is_echo(error):
            raise
    else:
        return 0
    if failure.default_store() is not None:
        failure.end_at_once(failure.EXIT_USER_ERROR)
    return failure.EXIT_USER_ERROR


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(top_level_help())
        return
    name = argv.pop(0)
    if name == "--version":
        print(importlib.import_module("megalign").__version__)
        return
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command; use one of {', '.join(COMMANDS)}")
    if "-h" in argv or "--help" in argv:
        print(command_help(name))
        return
    command = COMMANDS[name]
    args = parse_arguments(command.config, argv)
    world = launch.prepare_environment()
    args.validate(world)
    _check_given(args, command)
    liveness.start(int(os.environ["RANK"]), world)
    _train(args, command)


def _check_given(args: LoopConfig, command: Command) -> None:
    for names, example in command.needs:
        if not any(getattr(args, name) for name in names):
            raise UserError(f"{' or '.join(names)} is not given; give it, e.g. --{names[0]} {example}")


def _train(args: LoopConfig, command: Command) -> None:
    """Trains as the options say; train() leaves the model in output_dir."""
    train_dataset, eval_dataset = _datasets(args)
    module, name = command.trainer.split(":")
    trainer_class = getattr(importlib.import_module(f"megalign.trainers.{module}"), name)
    # The rest of what TRL's constructors take - rewards, their models - stands in the config.
    trainer = trainer_class(model=_model(args), args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.end()


def _model(args: LoopConfig) -> str | None:
    """Where training starts: PPO's may be the SFT model."""
    if args.model_name_or_path is None and isinstance(args, PPOConfig):
        return args.sft_model_path
    return args.model_name_or_path


def _datasets(args: LoopConfig) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training rows, and the evaluation rows where they are asked for."""
    from megalign.data.reading import load_split

    train_dataset = load_split(args, args.dataset_train_split)
    if not args.evaluates:
        return train_dataset, None
    return train_dataset, load_split(args, args.dataset_test_split, for_evaluation=True)


# --- options and help


def parse_arguments(cls: type[LoopConfig], argv: Sequence[str]) -> Any:
    """The config of `--config FILE` and `--field value` words; words win over the file."""
    words = Words([cls])
    (args,) = words.fill(words.values(argv))
    return args


def read_yaml(cls: type[LoopConfig], path: str) -> dict[str, Any]:
    """The fields of a flat YAML file; its `env` mapping goes into the environment."""
    return Words([cls]).read_yaml(path)


def top_level_help() -> str:
    """The commands."""
    lines = [f"  {name:8}{command.summary}" for name, command in COMMANDS.items()]
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


def command_help(name: str) -> str:
    """How to call the command, and its fields."""
    usage = f"usage: megalign {name} [--config run.yaml] [--field value ...]"
    return "\n".join([usage, "", *SYNTAX, *field_lines([COMMANDS[name].config])])
