"""What TRL's scripts import beside trainers and configs: their other arguments, the parser and get_dataset.

A script's own dataclasses go through the same parser; torch is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from megalign import failure
from megalign.config.base import Config, config
from megalign.config.help import SYNTAX, field_lines
from megalign.config.refused import Refusal
from megalign.config.refused_training import TRAINING
from megalign.config.values import option
from megalign.config.words import Words
from megalign.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

_MODEL_FIELDS = (
    "model_revision",
    "trust_remote_code",
    "attn_implementation",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "lora_task_type",
    "use_rslora",
    "use_dora",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)
_SPLIT_SEED = 42  # every rank must find the same rows in the test split


@config
class ScriptArguments(Config):
    """The script's dataset."""

    refused: ClassVar[Mapping[str, Refusal]] = {"ignore_bias_buffers": TRAINING["ignore_bias_buffers"]}

    dataset_name: str | None = None
    """Rows to train on: a file, a directory or a hub name."""
    dataset_config: str | None = None
    """Configuration of a hub dataset."""
    dataset_train_split: str = "train"
    """Split that is trained on."""
    dataset_test_split: str = "test"
    """Split that is evaluated on."""
    dataset_streaming: bool = False
    """Read rows as they are needed; max_steps says how many."""


@config
class ModelConfig(Config):
    """The model. TRL's fields of adapters and quantization are refused unless they ask for nothing."""

    refused: ClassVar[Mapping[str, Refusal]] = {name: TRAINING[name] for name in _MODEL_FIELDS}

    model_name_or_path: str | None = None
    """Hugging Face model directory or hub name."""
    dtype: str | None = option(
        "float32",
        choices=("float32", "bfloat16"),
        why="models are in bfloat16 with fp32 master weights, or in float32",
    )
    """What a script gives to model_init_kwargs: bfloat16 means bf16=True, float32 nothing (AdamW's master
    weights always are)."""


@config
class DatasetConfig(Config):
    """One dataset of a mixture, in the words of datasets.load_dataset."""

    path: str = ""
    """A file, a directory, a hub name, or a format (json, csv, parquet, text) whose files data_files names."""
    name: str | None = None
    """Configuration of a hub dataset."""
    data_dir: str | None = None
    """Directory of the files."""
    data_files: str | list[str] | dict[str, Any] | None = None
    """Files to read."""
    split: str = "train"
    """Split to read."""
    columns: list[str] | None = None
    """Columns to keep; all when not given."""
    fraction: float | None = option(None, above=0)
    """Share of the mixture: the first rows of each dataset, as many as make up the largest mixture with these
    shares; give it for all datasets or for none."""

    def check_values(self) -> None:
        """Also that there is a path."""
        super().check_values()
        if not self.path:
            raise UserError("a dataset of the mixture has no path; give path: a file, a directory or a hub name")


@config
class DatasetMixtureConfig(Config):
    """Several datasets, one after another."""

    datasets: list[DatasetConfig] = option([])
    """The datasets of the mixture, each a mapping of path, name, data_dir, data_files, split, columns,
    fraction."""
    streaming: bool = False
    """Read rows as they are needed; max_steps says how many."""
    test_split_size: float | None = option(None, above=0)
    """Rows that become the test split: a share below 1, or a number."""

    def check_values(self) -> None:
        """Also makes a DatasetConfig of each mapping."""
        super().check_values()
        self.datasets = [DatasetConfig(**one) if isinstance(one, Mapping) else one for one in self.datasets]


class TrlParser:
    """`--field value` words and a YAML file (`--config`) -> an instance of each dataclass, as TRL's parser gives."""

    def __init__(
        self,
        dataclass_types: type | Iterable[type] | None = None,
        *,
        prog: str | None = None,
        description: str | None = None,
    ) -> None:
        given = [dataclass_types] if isinstance(dataclass_types, type) else dataclass_types
        self.dataclass_types = list(given or [])
        self.prog, self.description = prog, description

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """One filled instance of each dataclass and, where asked for, the words that are none's field.

        Without `fail_with_unknown_args` unknown names of the file are left out; unknown words are an error.
        """
        failure.report_uncaught()  # a mistake ends the script with one line, as on the command line
        given = list(sys.argv[1:] if args is None else args)
        if "-h" in given or "--help" in given:
            print(self.format_help())
            raise SystemExit(0)
        in_words: list[str] = []
        in_file: list[str] = []
        words = Words(self.dataclass_types)
        values = words.values(
            given,
            unknown=in_words if return_remaining_strings else None,
            unknown_in_file=in_file if return_remaining_strings or not fail_with_unknown_args else None,
        )
        filled = words.fill(values)
        if not return_remaining_strings:
            return filled
        return (*filled, in_file, in_words) if separate_remaining_strings else (*filled, in_file + in_words)

    def parse_args_into_dataclasses(
        self, args: Iterable[str] | None = None, return_remaining_strings: bool = False
    ) -> tuple[Any, ...]:
        """The same, under the name that transformers' HfArgumentParser has for it."""
        return self.parse_args_and_config(args, return_remaining_strings)

    def format_help(self) -> str:
        """How to call the script, and every field."""
        usage = f"usage: {self.prog or sys.argv[0]} [--config run.yaml] [--field value ...]"
        about = [self.description, ""] if self.description else []
        return "\n".join([usage, "", *about, *SYNTAX, *field_lines(self.dataclass_types)])


# --- datasets


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """The mixture's rows as split "train", and as "test" the part that test_split_size takes of them."""
    from datasets import DatasetDict, IterableDatasetDict, concatenate_datasets

    mixture = mixture_config
    if not mixture.datasets:
        raise UserError("datasets names no dataset; give `datasets: [{path: rows.jsonl}]`")
    if mixture.streaming and mixture.test_split_size is not None:
        raise UserError(
            "test_split_size needs whole datasets and streaming=True reads none whole; name a test split, or set "
            "streaming=False"
        )
    parts = [_rows(one, mixture.streaming) for one in mixture.datasets]
    rows = concatenate_datasets(_in_shares(parts, mixture))
    if mixture.test_split_size is None:
        return (IterableDatasetDict if mixture.streaming else DatasetDict)({"train": rows})
    size = mixture.test_split_size
    return rows.train_test_split(test_size=size if size < 1 else int(size), seed=_SPLIT_SEED)


def _rows(one: DatasetConfig, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset

    from megalign.data.reading import UNREADABLE, load_rows
    from megalign.data.table import reason_of

    if one.data_dir is None and one.data_files is None and one.split.isidentifier():
        rows = load_rows(one.path, split=one.split, field="path", config=one.name, streaming=streaming)
    else:
        files = {"data_dir": one.data_dir, "data_files": one.data_files}
        try:
            rows = load_dataset(one.path, one.name, split=one.split, streaming=streaming, **files)
        except (OSError, *UNREADABLE) as error:
            raise UserError(
                f"dataset path={one.path!r} with {files} cannot be read: {reason_of(error)}; check the names, mend the "
                "files"
            ) from error
    return rows if one.columns is None else rows.select_columns(one.columns)


def _in_shares(
    parts: Sequence[Dataset | IterableDataset], mixture: DatasetMixtureConfig
) -> list[Dataset | IterableDataset]:
    """The first rows of each part, as many as make up the largest mixture with these shares that repeats none."""
    shares = [one.fraction for one in mixture.datasets]
    if shares == [None] * len(shares):
        return list(parts)
    if None in shares or mixture.streaming:
        raise UserError(
            "fraction must be given for all datasets of a mixture or for none, and not with streaming=True; mend the "
            "mixture"
        )
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    return [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]


# --- adapters and quantization


def get_peft_config(model_args: Any) -> None:
    """None: there are no adapters, and asking for them is an error."""
    if model_args.use_peft:
        raise UserError(f"use_peft=True is refused: {TRAINING['use_peft'].reason}; set use_peft=False")


def get_quantization_config(model_args: Any) -> None:
    """None: models are not quantized, and asking for it is an error."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UserError(f"load_in_4bit and load_in_8bit are refused: {TRAINING['load_in_4bit'].reason}; drop them")


def get_kbit_device_map() -> None:
    """None: each rank reads its own slices of the model."""
