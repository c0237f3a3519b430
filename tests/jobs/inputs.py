"""What the jobs are given: tiny models with a tokenizer, rows in files, run.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.data.tokenizers_made_here import make_tokenizer
from tests.tiny import save_tiny_model


def save_model(path: Path, family: str = "llama", **changes: Any) -> str:
    """A tiny model, and a tokenizer of its 420 tokens."""
    save_tiny_model(family, path, vocab_size=420, **changes)
    make_tokenizer().save_pretrained(path)
    return str(path)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_yaml(path: Path, **fields: Any) -> Path:
    """A run.yaml."""
    path.write_text(yaml.safe_dump(fields))
    return path


def sums(count: int) -> list[dict[str, Any]]:
    """Prompt and completion as text, of unequal lengths, and the answer as a number."""
    pairs = [(7 * row % 10, 10 ** (row % 3) + row) for row in range(count)]
    return [{"prompt": f"{a} + {b} = ", "completion": str(a + b), "answer": a + b} for a, b in pairs]
