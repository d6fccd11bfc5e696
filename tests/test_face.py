"""`import dyconvert` and the commands that do no work: what they import, and that nothing is missing for it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import make_model_names
import pytest

import dyconvert
from dyconvert.models import listing

INIT = Path(dyconvert.__file__)


def imported_by(code: str, *modules: str) -> list[str]:
    """Which of the modules are imported in a fresh process that runs the code."""
    code = f"{code}\nimport sys, json; print(json.dumps([m for m in {modules!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_type_checkers_see_the_same_names():
    tree = ast.parse(INIT.read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert seen == dyconvert._HOME_OF
    assert sorted([*seen, "__version__"]) == sorted(dyconvert.__all__)


def test_every_name_is_there():
    for name in dyconvert.__all__:
        assert getattr(dyconvert, name) is not None
        assert name in dir(dyconvert)
    with pytest.raises(AttributeError, match="convrt"):
        dyconvert.convrt  # noqa: B018
    # Modules whose names are like a function's would take its place.
    assert callable(dyconvert.verify)
    assert not {path.stem for path in INIT.parent.glob("*.py")} & set(dyconvert.__all__)


@pytest.mark.parametrize(
    "code", ["import dyconvert; dyconvert.nn", "import dyconvert; dyconvert.models", "from dyconvert import *"]
)
def test_packages_come_with_it(code):
    assert imported_by(code) == []


def test_import_is_light():
    heavy = ("torch", "torchvision", "pydantic", "rich", "lightning")
    assert imported_by("import dyconvert", *heavy) == []
    others = ("torchvision", "lightning", "matplotlib", "onnx", "timm", "torch_pruning", "torch._dynamo")
    assert imported_by("from dyconvert import *", *others) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["inspekt", "x"],
        ["resnet5o"],
        ["resnet18", "--method", "dynt"],
        ["sd.pth"],
        ["ls", "--json"],
        ["methods"],
        ["recipes", "ls"],
        ["recipes", "show", "quickstart"],
        ["recipes", "validate", "quickstart"],
        ["recipes", "schema"],
        ["recipes", "shw"],
        ["export", "x", "--too", "onnx"],
    ],
    ids=" ".join,
)
def test_commands_that_do_no_work_import_no_torch(arguments):
    code = f"""
import sys
from dyconvert.cli import main
sys.argv = ["dyconvert", *{arguments!r}]
try:
    main()
except SystemExit:
    print()
"""
    assert imported_by(code, "torch", "torchvision", "timm", "lightning", "matplotlib") == []


def test_names_are_those_of_the_libraries():
    pytest.importorskip("timm")
    shipped = json.loads(listing.SHIPPED.read_text(encoding="utf-8"))
    found = make_model_names.names()
    for library, entry in shipped.items():
        if entry["version"] in (None, found[library]["version"]):
            assert entry == found[library], "python tests/make_model_names.py writes the list anew"


def test_names_of_another_version_are_kept(monkeypatch, tmp_path):
    asked = []

    def names_of(library: str) -> list[str]:
        asked.append(library)
        return ["net_of_tomorrow"]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(listing, "version_of", lambda library: "99.0")
    monkeypatch.setattr(listing, "names_of", names_of)
    for name in ("torchvision", "timm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for _ in range(2):
        assert listing.list_models("torchvision") == {"torchvision": ["net_of_tomorrow"]}
    assert asked == ["torchvision"]
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{")  # damaged: asked again
    assert listing.list_models("torchvision") == {"torchvision": ["net_of_tomorrow"]}
    assert asked == ["torchvision"] * 2
