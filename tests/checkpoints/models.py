"""What the tests of conversions share: marked models, converted ones, and their tensors as bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalign.checkpoints.convert import hf_to_megatron
from tests.resharding.test_round_trip import save_marked_model


class Converted(dict[str, tuple[str, Path]]):
    """Family -> (its marked model, that as a checkpoint), made when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def __missing__(self, family: str) -> tuple[str, Path]:
        model = save_marked_model(family, self._directory / family)
        hf_to_megatron(Path(model), self._directory / f"{family}-megatron")
        self[family] = model, self._directory / f"{family}-megatron"
        return self[family]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Checkpoints of the families; nothing may change them."""
    return Converted(tmp_path_factory.mktemp("converted"))


def bits_of(directory: str | Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], str]]:
    """Dtype, shape and hash of every tensor in a Hugging Face directory."""
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[name] = tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw).hexdigest()
    return found
