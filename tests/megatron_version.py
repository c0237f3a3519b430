"""Which Megatron-Core the tests run on: the pinned one, or the one that tests/run.sh names in MEGALIGN_MEGATRON."""

from __future__ import annotations

import os
import runpy
from importlib.util import find_spec
from pathlib import Path

PINS = Path(__file__).parents[1] / "tools/requirements-cpu.txt"


def wanted_version() -> str:
    """The version that was asked for."""
    (pin,) = (line for line in PINS.read_text().splitlines() if line.startswith("megatron-core=="))
    return os.environ.get("MEGALIGN_MEGATRON", pin.partition("==")[2])


def found_version() -> str:
    """The version that an import would find, without its seconds."""
    package = find_spec("megatron")
    assert package is not None and package.submodule_search_locations is not None
    core = Path(next(iter(package.submodule_search_locations)), "core")
    # Not __version__: 0.19's is followed by the commit of whatever repository surrounds it.
    return str(runpy.run_path(str(core / "package_info.py"))["__shortversion__"])
