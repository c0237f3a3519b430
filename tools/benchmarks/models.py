"""The model that is trained, and how many operations a token of it takes."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from megalign.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "quickstart/smollm2"
# Llamas: layers, hidden, feed-forward, heads, key/value heads, vocabulary
SHAPES = {
    "1b": (16, 2048, 8192, 32, 8, 128256),
    "2b": (40, 2048, 8192, 32, 8, 128256),
    "8b": (32, 4096, 14336, 32, 8, 128256),
}


def found_model(path: Path) -> Path:
    """The directory, which has a model; SmolLM2's is made where it is not there."""
    if not (path / "config.json").exists():
        if path.resolve() != SMOLLM2.resolve():
            raise UserError(f"--model {path} has no config.json; give a Hugging Face directory")
        subprocess.run([sys.executable, ROOT / "tools/gguf_to_hf.py", "--output", path], check=True)
    return path


def multiplied_weights(model: Path) -> int:
    """Numbers in the model's files that a token is multiplied by: all but an embedding that is not the head too."""
    config = json.loads((model / "config.json").read_text())
    # What a config.json leaves out is transformers' default: tied.
    tied = config.get("tie_word_embeddings", True)
    sizes = {name: math.prod(entry["shape"]) for name, entry in _tensors(model).items()}
    return sum(size for name, size in sizes.items() if tied or not name.endswith("embed_tokens.weight"))


def _tensors(model: Path) -> dict[str, Any]:
    """Of the safetensors files, of which only the headers are read."""
    found: dict[str, Any] = {}
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found |= json.loads(file.read(length))
    found.pop("__metadata__", None)
    return found
