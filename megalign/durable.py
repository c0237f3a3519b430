"""Files that outlive a loss of power: on the disk before anything says that they are whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse a directory, whose names are the server's.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path, *, but: Collection[Path] = ()) -> None:
    """The same of all files in it, at any depth, and of their names; `but` are on the disk already."""
    for path in directory.rglob("*"):
        if path not in but:
            sync(path)
    sync(directory)


def write(file: Path, content: bytes) -> None:
    """A file's whole content."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def rename(source: Path, target: Path) -> None:
    """A file or directory whose content is on the disk gets another name beside it, all at once."""
    source.replace(target)
    sync(target.parent)
