"""What a Hugging Face directory holds besides weights: config.json, generation_config.json, the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megalign.conversion.hf_files import CONFIG_FILE, read_config, read_json

GENERATION_FILE = "generation_config.json"
# What makes a directory loadable besides weights and config.json; copied from the source when it is there.
COMPANION_FILES = (
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def write_companions(
    source: Path,
    target: Path,
    *,
    config_changes: Mapping[str, Any] | None = None,
    special_tokens: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Copies them into the directory `target`, with the (changed) config; `dtype` is the weights', if it is known."""
    for file in COMPANION_FILES:
        if (source / file).exists():
            shutil.copyfile(source / file, target / file)
    config = read_config(source) | dict(config_changes or {})
    if dtype is not None:
        # transformers before 4.56 knows only torch_dtype: renew the key that the source has.
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config.update(dict.fromkeys(keys, str(dtype).removeprefix("torch.")))
    file = source / GENERATION_FILE
    generation = read_json(file) if file.exists() else None
    if align_special_tokens(config, generation, special_tokens or {}) and generation is not None:
        write_json(target / GENERATION_FILE, generation)
    write_json(target / CONFIG_FILE, config)


def align_special_tokens(config: dict[str, Any], generation: dict[str, Any] | None, tokens: Mapping[str, int]) -> bool:
    """Brings a config.json and a generation_config.json to the tokenizer's tokens, in place; whether they differed.

    transformers' rule: a list of end tokens gets the tokenizer's in front and keeps the others, and the generation
    config's becomes such a list, because any of them ends a completion.
    """
    changed = False
    for name, token in tokens.items():
        known = [_as_list(values.get(name)) for values in (config, generation) if values is not None]
        if all(token in ids for ids in known):
            continue
        changed, several = True, name == "eos_token_id"
        in_front = [token, *(other for other in known[0] if other != token)]
        config[name] = in_front if several and isinstance(config.get(name), list) else token
        if generation is not None:
            in_front = [token, *(other for other in known[1] if other != token)]
            generation[name] = in_front if several else token
    return changed


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, as transformers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
