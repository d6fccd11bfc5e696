"""docs/layout.md says which room holds what and in which order they stand; here it is compared with the imports.

Imports within functions count too: they make a start quick, and a circle no better. Those for a type checker alone
do not.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dyconvert

PACKAGE = Path(dyconvert.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "layout.md"
ABOVE_ALL = {"__init__", "__main__"}  # the face and the start of the command line


def rooms_of_the_page() -> list[str]:
    table = PAGE.read_text(encoding="utf-8").split("## Where to begin")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def files() -> dict[str, Path]:
    """Every file of the package by its module's name within it, `nn.convs`; a folder's own file by the folder's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "dyconvert":
                continue
            inside = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            yield next((module for module in inside if module in FILES), "__init__")


def test_the_page_names_every_room() -> None:
    rooms = rooms_of_the_page()
    assert len(set(rooms)) == len(rooms)
    assert set(rooms) == {name.split(".")[0] for name in FILES} - ABOVE_ALL


@pytest.mark.parametrize("room", rooms_of_the_page())
def test_a_room_imports_only_what_stands_above_it(room: str) -> None:
    rooms = rooms_of_the_page()
    allowed = {*rooms[: rooms.index(room) + 1]}
    for module, path in FILES.items():
        if module.split(".")[0] == room:
            upwards = {name for name in imports(path) if name.split(".")[0] not in allowed}
            # A command and a run may use the face, as users do.
            upwards -= {"__init__"} if room in ("cli", "finetuning") else set()
            assert not upwards, f"{path.name} imports {', '.join(sorted(upwards))}"


def test_no_circle_of_files() -> None:
    graph = {module: {name for name in imports(path) if name != module} for module, path in FILES.items()}
    for module in ABOVE_ALL:  # the face imports all lazily, so that one can import it from anywhere
        graph.pop(module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", re.findall(r"`(\w+/\w+\.py|\w+\.py)`", PAGE.read_text(encoding="utf-8")))
def test_files_that_the_page_names_exist(path: str) -> None:
    # The tests may be those of a clone, and the package installed elsewhere.
    assert (PACKAGE / path).is_file() or (Path(__file__).parents[1] / path).is_file()


def test_each_limit_has_its_reason() -> None:
    lines = (PACKAGE / "limits.py").read_text(encoding="utf-8").splitlines()
    limits = [number for number, line in enumerate(lines) if re.match("[A-Z_]+ = ", line)]
    assert len(limits) > 30
    assert [lines[number] for number in limits if not lines[number - 1].startswith("# ")] == []
