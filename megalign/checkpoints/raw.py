"""Bytes that go from file to file as they are: the kernel copies them, no process maps or holds them."""

from __future__ import annotations

import json
import os
from typing import IO, NamedTuple

from megalign.conversion.hf_files import HfReader
from megalign.conversion.rules import Piece


class FileRun(NamedTuple):
    """Bytes of a file, which is open as long as somebody has the run."""

    file: IO[bytes]
    offset: int
    nbytes: int


def send(run: FileRun, target: IO[bytes]) -> None:
    """Writes them where `target` stands."""
    target.flush()
    end = target.tell() + run.nbytes
    sent = 0
    while sent < run.nbytes:
        count = os.sendfile(target.fileno(), run.file.fileno(), run.offset + sent, run.nbytes - sent)
        if count == 0:
            raise OSError(f"a file ended {run.nbytes - sent} bytes early")
        sent += count
    target.seek(end)


class SafetensorsRuns:
    """Where the tensors of a Hugging Face directory are in its files."""

    def __init__(self, reader: HfReader) -> None:
        self._files: dict[str, IO[bytes]] = {}
        self._begins: dict[str, tuple[IO[bytes], int]] = {}
        for name in reader.names():
            path = str(reader.file_of(name))
            if path not in self._files:
                self._files[path] = open(path, "rb")  # noqa: SIM115  (for as long as the conversion)
                self._note(self._files[path])

    def run_of(self, piece: Piece, itemsize: int) -> FileRun | None:
        """Its bytes, where they stand in one run as the piece has them."""
        index, shape = piece.hf_index, piece.hf_shape
        if piece.transposed or not all(isinstance(part, slice) and part.step in (None, 1) for part in index):
            return None
        if any((part.start, part.stop) != (0, size) for part, size in zip(index[1:], shape[1:], strict=True)):
            return None
        row = itemsize
        for size in shape[1:]:
            row *= size
        file, begin = self._begins[piece.hf_name]
        return FileRun(file, begin + index[0].start * row, (index[0].stop - index[0].start) * row)

    def _note(self, file: IO[bytes]) -> None:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))  # safetensors has read it before, and found it sound
        for name, entry in header.items():
            if name != "__metadata__":
                self._begins[name] = file, 8 + length + entry["data_offsets"][0]
