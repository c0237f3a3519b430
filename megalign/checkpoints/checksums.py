"""A checkpoint's manifest, which its trainer writes last, and whether the files are still what it says.

The checksums are xxh3's of 128 bits: against bits that flip, not against forgery.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
_BLOCK = 1 << 24  # bytes
_KINDS = {"step": int, "written": float, "settings": dict, "layout": dict, "files": dict}
_KINDS_OF_A_FILE = {"bytes": int, "xxh3_128": str}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What the checkpoint says of itself; None where it is not whole, or the manifest itself is damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    is_whole = _has(manifest, _KINDS) and manifest["files"]
    is_whole = is_whole and all(_has(file, _KINDS_OF_A_FILE) for file in manifest["files"].values())
    return manifest if is_whole and all(map(_is_inside, manifest["files"])) else None


def first_fault(files: Iterable[tuple[Path, Mapping[str, Any]]]) -> str | None:
    """What is wrong with the first of the files that is not what its manifest says; reads them to their ends."""
    return next(filter(None, (_fault(file, then) for file, then in files)), None)


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


def _has(value: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _is_inside(name: str) -> bool:
    """Whether a file's name leads to one of the checkpoint's directory."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _fault(file: Path, then: Mapping[str, Any]) -> str | None:
    try:
        size = file.stat().st_size if file.exists() else "no"
        if size != then["bytes"]:
            return f"{file} has {size} bytes where its manifest says {then['bytes']}"
        if checksum(file) != then["xxh3_128"]:
            return f"{file} is damaged: its checksum is not the one in its manifest"
    except OSError as error:
        return f"{file} cannot be read ({error})"
    return None
