"""Checksums of a checkpoint's files: xxh3 of 128 bits, against bits that flip, not against forgery."""

from __future__ import annotations

from pathlib import Path

import xxhash

_BLOCK = 1 << 24  # bytes


def checksum(file: Path) -> str:
    """Of a file, at the speed of the page cache."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksum_of(content: bytes) -> str:
    """Of a file that will have this content."""
    return xxhash.xxh3_128_hexdigest(content)
