"""Lower rooms never import higher ones: README's row of rooms, held against every import statement."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "megalign").rglob("*.py"))


def rooms() -> dict[str, int]:
    """The level of each room, from the sentence in README that says them, the lowest first."""
    (sentence,) = re.findall(r"Lower rooms never import higher ones: (.*?)\s\(`tests", README, flags=re.DOTALL)
    levels = [re.findall(r"`([^`]+)`", part) for part in sentence.split("then")]
    return {room: level for level, names in enumerate(levels) for room in " ".join(names).split()}


README = (ROOT / "README.md").read_text()
LEVELS = rooms()


def room_of(module: str) -> str | None:
    """`megalign.data.rows` -> data, `tools.benchmark` -> tools; None of what is not this house's."""
    first, *rest = module.split(".")
    if first in ("tools", "examples"):
        return first
    if first != "megalign":
        return None
    assert rest and rest[0] in LEVELS, f"{module} is no room: import it from where it is made"
    return rest[0]


def imported(path: Path) -> set[str]:
    """Rooms that a file imports while it runs; what only a type checker reads does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += [f"{node.module}.{name.name}" for name in node.names]
    return {room for room in map(room_of, names) if room is not None}


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("import megalign.trainers.base as base", "trainers"),
        ("from megalign import trainers", "trainers"),
        ("def late():\n    from megalign.trainers.base import Trainer", "trainers"),
        ("from tools.benchmarks import report", "tools"),
        ("if TYPE_CHECKING:\n    import megalign.trainers", None),
    ],
)
def test_an_import_is_seen(line: str, room: str | None, tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(line)
    assert imported(file) == ({room} if room else set())


@pytest.mark.parametrize("line", ["from megalign import DPOTrainer", "from megalign import *", "import megalign"])
def test_a_room_imports_no_trainer_through_the_package(line: str, tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(line)
    with pytest.raises(AssertionError, match="is no room"):
        imported(file)


def test_every_room_has_its_level() -> None:
    there = {path.relative_to(ROOT / "megalign").parts[0].removesuffix(".py") for path in MODULES}
    assert there - {"__init__", "__main__"} == LEVELS.keys() - {"tools", "examples"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_imports_a_higher_one(path: Path) -> None:
    room = path.relative_to(ROOT / "megalign").parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    higher = {other for other in imported(path) if LEVELS[other] > LEVELS[room]}
    assert not higher, f"{room} imports {higher}, which stand above it"
