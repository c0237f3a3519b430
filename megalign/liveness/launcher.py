"""Files that the ranks of one launcher have in common on a node: named after it, removed once it is gone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path


def path_of_launcher(ending: str) -> Path:
    """A path that all ranks of this process's launcher know, in the directory for temporary files.

    What launchers that are gone have left there goes first: a rank that died could not remove its files, and none can
    know that it is the last to need what all share.
    """
    launcher = os.getppid()
    stem, place = f"megalign-{os.getuid()}-{_namespace()}-", Path(tempfile.gettempdir())
    begun = started(launcher)
    if begun is not None:
        _remove_left_behind(place, stem)
    return place / f"{stem}{launcher}-{begun or 0}{ending}"


def started(process: int | str) -> str | None:
    """When the process started, in clock ticks since the machine did; None where it is gone, waited for or not."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            words = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]


def _namespace() -> int:
    """Where numbers of processes mean the same: containers of one machine may share a directory for temporary files."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _remove_left_behind(place: Path, stem: str) -> None:
    for path in place.glob(f"{stem}*"):
        named = re.match(r"(\d+)-(\d+)[-.]", path.name.removeprefix(stem))
        # 0: another user's launcher, where /proc hides those; whether it is gone is not to be known.
        if named is None or named[2] == "0" or started(named[1]) == named[2]:
            continue
        with contextlib.suppress(OSError):  # another rank was faster
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
