"""Safetensors files and indices that are cut, that lie, or that lead elsewhere: refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megalign.conversion.hf_files import HfReader
from megalign.errors import UserError
from tests.fuzzing import fuzzing

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b.weight": torch.ones(5, dtype=torch.bfloat16)}
Header = dict[str, Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """All that a trainer would ask a reader for."""
    reader = HfReader(path)
    for name in reader.names():
        reader.dtype(name)
    reader.check({name: tuple(tensor.shape) for name, tensor in TENSORS.items()}, ignored=set())
    return {name: reader.read(name, tuple(slice(size) for size in reader.shape(name))) for name in reader.names()}


def refused(path: Path, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        read_all(path)
    said = str(caught.value)
    assert str(path) in said and all(part in said for part in parts) and "\n" not in said and len(said) < 1500, said
    return said


def rewritten(path: Path, change: Callable[[Header], Any]) -> None:
    """The file with another header in front of the same bytes."""
    file = path / "model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_the_whole_file_is_read(directory: Path) -> None:
    found = read_all(directory)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)


@pytest.mark.parametrize("length", [0, 4, 8, 40, -1, -20])
def test_a_cut_file_is_refused_by_name(length: int, directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(directory, "model.safetensors cannot be read", "download or export it again")


@pytest.mark.parametrize("size", [0, 1, 7, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_whose_length_lies_is_refused_by_name(size: int, directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    refused(directory, "model.safetensors cannot be read")


LIES: dict[str, Callable[[Header], Any]] = {
    "an offset behind the end": lambda header: header["a.weight"].update(data_offsets=[0, 10**9]),
    "an offset before the start": lambda header: header["a.weight"].update(data_offsets=[-4, 44]),
    "an offset turned round": lambda header: header["a.weight"].update(data_offsets=[48, 0]),
    "one place for two": lambda header: header["a.weight"].update(data_offsets=header["b.weight"]["data_offsets"]),
    "a larger shape": lambda header: header["a.weight"].update(shape=[3, 400]),
    "a negative shape": lambda header: header["a.weight"].update(shape=[-3, -4]),
    "an endless shape": lambda header: header["a.weight"].update(shape=[2**62, 2**62]),
    "a shape of text": lambda header: header["a.weight"].update(shape="3,4"),
    "no shape": lambda header: header["a.weight"].pop("shape") and None,
    "no type": lambda header: header["a.weight"].pop("dtype") and None,
    "an unknown type": lambda header: header["a.weight"].update(dtype="F33"),
    "a list": lambda header: [header],
    "a number": lambda header: 5,
    "no mapping": lambda header: header.update({"a.weight": 5}),
    "a hole": lambda header: header.pop("b.weight") and None,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_by_name(lie: str, directory: Path) -> None:
    rewritten(directory, LIES[lie])
    refused(directory)


@pytest.mark.parametrize("dtype", ["I32", "BOOL", "F8_E4M3", "U8"])
def test_a_type_that_no_weight_has_is_refused_by_name(dtype: str, directory: Path) -> None:
    kinds = {"I32": torch.int32, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
    save_file({**TENSORS, "a.weight": torch.zeros(3, 4).to(kinds[dtype])}, directory / "model.safetensors")
    refused(directory, f"a.weight in {directory} is {dtype}", "save it in BF16")


def test_a_file_of_junk_and_a_directory_are_refused_by_name(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(b"PK\x03\x04" + bytes(100))  # torch.save's
    refused(directory, "model.safetensors cannot be read")
    file.unlink()
    file.mkdir()
    refused(directory, "model.safetensors")


# ---- the index


def with_index(directory: Path, content: Any) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (directory / "model.safetensors.index.json").write_bytes(text if isinstance(text, bytes) else text.encode())


HERE = "model-00001-of-00001.safetensors"
INDICES: dict[str, tuple[Any, str]] = {
    "an absent file": ({"weight_map": {"a.weight": HERE, "b.weight": "b.safetensors"}}, "b.safetensors does not"),
    "a file outside": ({"weight_map": {"a.weight": "../../x.safetensors"}}, "'../../x.safetensors', which is not"),
    "an absolute path": ({"weight_map": {"a.weight": "/etc/passwd"}}, "'/etc/passwd', which is not beside it"),
    "the directory above": ({"weight_map": {"a.weight": ".."}}, "'..', which is not beside it"),
    "the directory": ({"weight_map": {"a.weight": "."}}, "'.', which is not beside it"),
    "no name": ({"weight_map": {"a.weight": ""}}, "'', which is not beside it"),
    "a nul": ({"weight_map": {"a.weight": "a\x00b"}}, "which is not beside it"),
    "a number": ({"weight_map": {"a.weight": 5}}, "5, which is not beside it"),
    "a list of files": ({"weight_map": {"a.weight": [HERE]}}, "which is not beside it"),
    "a tensor that the file has not": ({"weight_map": {"c.weight": HERE}}, "lacks c.weight"),
    "no map": ({"metadata": {}}, "weight_map"),
    "a list for a map": ({"weight_map": [HERE]}, "weight_map"),
    "nothing": ({"weight_map": {}}, "weight_map"),
    "a list": ([1], "must be a mapping"),
    "no JSON": ("{", "is not valid JSON"),
    "no text": (b"\xff\xfe", "is not valid JSON"),
    "depth": ("[" * 100_000, "is not valid JSON"),
    "a pickle's name": ({"weight_map": {"a.weight": "pytorch_model.bin"}}, "pytorch_model.bin"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_leads_elsewhere_is_refused_by_name(case: str, directory: Path) -> None:
    content, part = INDICES[case]
    with_index(directory, content)
    refused(directory, part)


def test_a_link_out_of_the_directory_is_the_users_own(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The hub's cache is made of links."""
    elsewhere = tmp_path_factory.mktemp("blobs") / "blob"
    (directory / "model.safetensors").rename(elsewhere)
    (directory / "model.safetensors").symlink_to(elsewhere)
    assert read_all(directory).keys() == TENSORS.keys()


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_config_that_is_no_mapping_is_refused_by_name(content: bytes, directory: Path) -> None:
    (directory / "config.json").write_bytes(content)
    refused(directory, "config.json")


def test_a_fuzzed_file_is_refused_or_holds_tensors_of_the_right_shape(directory: Path) -> None:
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    change = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))

    @fuzzing(150)
    @given(st.lists(change, min_size=1, max_size=4), st.booleans())
    def run(changes: list[tuple[int, int]], cut: bool) -> None:
        content = bytearray(whole)
        for place, byte in changes:
            content[place] = byte
        file.unlink()  # the file that a reader has mapped stays as it was
        file.write_bytes(bytes(content[: changes[0][0]]) if cut else bytes(content))
        try:
            found = read_all(directory)
        except UserError as error:
            assert "\n" not in str(error) and str(directory) in str(error)
        else:
            assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in TENSORS.items()}

    run()
