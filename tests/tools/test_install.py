"""The pinned sets against setup.py's ranges, and what tools/install.sh refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "tools" / f"requirements-{name}.txt").read_text().splitlines()
    return dict(_pin(line) for line in lines if not line.startswith("#"))


def _pin(line: str) -> tuple[str, str]:
    name, version = line.split("==")
    return canonicalize_name(name), version


@pytest.fixture
def packaging(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py tells setuptools."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return told


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_pinned_versions_are_inside_the_ranges(packaging: dict[str, Any], platform: str) -> None:
    pinned = pins(platform)
    extras = packaging["extras_require"]
    for text in [*packaging["install_requires"], *extras[platform], "matplotlib", "gguf"]:
        wanted = Requirement(text)
        assert canonicalize_name(wanted.name) in pinned, text
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


def test_the_tests_packages_are_pinned(packaging: dict[str, Any]) -> None:
    pinned = pins("cpu") | pins("test")
    for text in packaging["extras_require"]["dev"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


def test_the_newest_megatron_is_inside_the_range_and_newer_than_the_pinned(packaging: dict[str, Any]) -> None:
    (wanted,) = (w for w in map(Requirement, packaging["install_requires"]) if w.name == "megatron-core")
    newest = pins("megatron-newest")
    assert newest.keys() == {"megatron-core"}
    assert wanted.specifier.contains(newest["megatron-core"])
    assert Version(newest["megatron-core"]) > Version(pins("cpu")["megatron-core"])


def test_megalign_version_is_setups(packaging: dict[str, Any]) -> None:
    import megalign

    assert packaging["version"] == megalign.__version__


def test_what_breaks_an_installation_is_pinned_nowhere() -> None:
    for name in ("cpu", "cuda", "test"):
        assert "apex" not in pins(name)  # PyPI's apex is an unrelated web toolkit
    assert not {"torchvision", "torchaudio", "torchcodec"} & pins("cpu").keys()  # builds that break CPU torch
    assert not pins("test").keys() & pins("cpu").keys()


@pytest.mark.parametrize(("words", "named"), [(["gpu"], "'gpu'"), (["cpu", "--tests"], "'--tests'"), ([], "''")])
def test_a_wrong_word_is_named_with_the_right_ones(words: list[str], named: str) -> None:
    ended = subprocess.run(["bash", ROOT / "tools/install.sh", *words], capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("megalign: error:")
    assert named in line
    assert "{cpu|cuda} [--test]" in line


def copy_tools(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for path in (ROOT / "tools").glob("*.*"):
        (tmp_path / "tools" / path.name).write_text(path.read_text())


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    copy_tools(tmp_path)
    ended = subprocess.run(
        ["bash", tmp_path / "tools/install.sh", "cpu"],
        capture_output=True,
        text=True,
        env={"PYTHON": "/nowhere/python3.11", "PATH": "/usr/bin:/bin"},
    )
    assert ended.returncode == 2
    assert "/nowhere/python3.11" in ended.stderr
    assert not (tmp_path / ".venv").exists()


# Stands for .venv's pip: notes what it is asked, makes the directory it is given, knows no newer Megatron offline.
PIP = """#!/bin/bash
echo "$*" >> asked
[[ $* != *--target* ]] || { [[ ! -e offline ]] && mkdir "$(sed 's/.*--target \\([^ ]*\\).*/\\1/' <<< "$*")"; }
"""


def test_the_newest_megatron_is_installed_once_for_the_tests_alone(tmp_path: Path) -> None:
    copy_tools(tmp_path)
    (tmp_path / "setup.py").touch()
    for built in ("csrc/ops.cpp", "megalign/_ops.so"):
        (tmp_path / built).parent.mkdir()
        (tmp_path / built).touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, text in {"pip": PIP, "python": "#!/bin/bash\n"}.items():
        (tmp_path / ".venv/bin" / name).write_text(text)
        (tmp_path / ".venv/bin" / name).chmod(0o755)

    def install(*words: str) -> tuple[int, int, str]:
        """The status, how often pip was asked for a directory, and the errors."""
        (tmp_path / "asked").write_text("")
        ended = subprocess.run(["bash", tmp_path / "tools/install.sh", *words], capture_output=True, text=True)
        return ended.returncode, (tmp_path / "asked").read_text().count("--target"), ended.stderr

    assert install("cpu") == (0, 0, "")
    (tmp_path / "offline").touch()
    status, asked, told = install("cpu", "--test")
    assert (status, asked) == (2, 1)
    assert told == (
        "megalign: error: installing tools/requirements-megatron-newest.txt failed: pip's own message is above\n"
    )
    (tmp_path / "offline").unlink()
    assert install("cpu", "--test") == (0, 1, "")
    assert (tmp_path / f".venv/megatron-{pins('megatron-newest')['megatron-core']}").is_dir()
    assert install("cpu", "--test") == (0, 0, "")
