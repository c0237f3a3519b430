"""What a trainer's constructor is given: refused by name, or brought into the form that the trainers use."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from megalign.config.base import field_of
from megalign.errors import UserError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

# TRL's constructor arguments that every trainer here refuses, with the reason and the nearest way.
COMMON_REFUSED = {
    "data_collator": "batches are always packed; bring rows into the dataset's form instead",
    "optimizers": "the optimizer is Megatron's sharded AdamW; set learning_rate, adam_* and lr_scheduler_type",
    "quantization_config": "quantized base models are not built; use bf16=True",
    "peft_config": "adapters are not built yet; all weights are trained",
    "compute_metrics": "whole logits never exist here; read the eval_* metrics or use a callback",
    "preprocess_logits_for_metrics": "whole logits never exist here; read the eval_* metrics",
}


# Arguments of earlier TRL versions, with the present word.
RENAMED = {
    "config": "args",
    "tokenizer": "processing_class",
    "reward_model": "reward_funcs",
    "ppo_config": "args",
}


def refuse_arguments(trainer: type, refused: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Names each constructor argument that is not there, unless it asks for nothing."""
    known = COMMON_REFUSED | dict(refused)
    for name, value in given.items():
        if name not in known and name in RENAMED:
            raise UserError(f"{trainer.__name__} has no argument {name}: it is now {RENAMED[name]}")
        if name not in known and (field := field_of(trainer.config_class, name)) is not None:
            config = trainer.config_class.__name__
            raise UserError(f"{trainer.__name__} has no argument {name}: it is now args={config}({field}=...)")
        if name not in known:
            names = ["train_dataset", "eval_dataset", "processing_class", "callbacks", *known]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{trainer.__name__} has no argument {name}{hint}")
        if value is not None and value != (None, None):
            raise UserError(f"{trainer.__name__}({name}=...) is refused: {known[name]}")


def model_directory(model: Any, args: Any) -> str:
    """The local directory of the model: as given, or the snapshot of a hub name."""
    name = model if model is not None else args.model_name_or_path if args is not None else None
    if name is None:
        raise UserError("model is missing: give a Hugging Face directory as model or model_name_or_path")
    if not isinstance(name, str | Path):
        raise UserError(
            f"model is a {type(name).__name__}, but each rank reads its own slices from disk; give the path of "
            "a Hugging Face directory (model.save_pretrained makes one)"
        )
    name = str(name)
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model directory {name} does not exist; give a Hugging Face directory or a hub name")
    return _hub_snapshot(name)


def make_output_dir(path: str) -> None:
    """Makes output_dir, in which files can be made, before anything long has run."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={path!r} cannot be made ({error.strerror}); choose another directory") from error
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f"output_dir={path!r} cannot be written to ({error.strerror}); choose another directory"
        ) from error


def refuse_same_directory(output_dir: str, models: Mapping[str, str | None]) -> None:
    """The trained model must not take the place of one that the run starts from; `models` are paths by their names."""
    target = Path(output_dir).resolve()
    for name, path in models.items():
        if path is not None and Path(path).resolve() == target:
            raise UserError(
                f"output_dir={output_dir!r} is also the directory of {name}, which the trained model would overwrite; "
                "choose another output_dir"
            )


def check_processing_class(given: Any) -> None:
    """A tokenizer, or None for the model directory's own."""
    if given is not None and (isinstance(given, type) or not callable(given)):
        found = given.__name__ if isinstance(given, type) else repr(given)
        raise UserError(
            f"processing_class={found} is not a tokenizer; give what AutoTokenizer.from_pretrained(path) returns"
        )


def as_list(given: Any) -> list[Any]:
    """None, one or several as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def has_tokenizer(model_path: str) -> bool:
    """Whether the directory holds a tokenizer; rows that are token ids already need none."""
    return any((Path(model_path) / file).exists() for file in _TOKENIZER_FILES)


def check_evaluation(args: Any, eval_dataset: Any) -> None:
    """Rows to evaluate on, where the config asks for an evaluation."""
    if args.evaluates and eval_dataset is None:
        asked = f"eval_strategy={args.eval_strategy!r}" if args.eval_strategy != "no" else "eval_on_start=True"
        raise UserError(f"{asked} needs an eval_dataset; give one, or eval_strategy=no and eval_on_start=False")


def check_callbacks(callbacks: Any) -> Sequence[Any] | None:
    """The user's callbacks, each a TrainerCallback or a class of one."""
    if isinstance(callbacks, TrainerCallback):
        raise UserError(f"callbacks={type(callbacks).__name__} is one callback; give a list: callbacks=[...]")
    for callback in callbacks or []:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise UserError(f"callback {kind.__name__} is not a transformers.TrainerCallback; derive it from one")
    return callbacks


def _hub_snapshot(name: str) -> str:
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return snapshot_download(name, allow_patterns=files)
    except (OSError, ValueError) as error:  # huggingface_hub's own errors derive from these
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model {name!r} is neither a directory nor a model that the hub gives ({reason}); give a local "
            "Hugging Face directory"
        ) from error
