"""The documentation: its examples run, its links lead somewhere, and its site can be built."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import dyconvert

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/*.md"))
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
# Whose docstrings have examples.
MODULES = (
    "dyconvert",
    "dyconvert.checkpoint.saving",
    "dyconvert.differences",
    "dyconvert.methods",
    "dyconvert.nn.convs",
    "dyconvert.surgery.collapse",
    "dyconvert.surgery.convert",
    "dyconvert.surgery.fuse",
    "dyconvert.surgery.trainable",
)


@pytest.mark.parametrize("page", [page for page in PAGES if ">>>" in page.read_text()], ids=lambda page: page.name)
def test_examples_of_a_page(page):
    failed, ran = doctest.testfile(str(page), module_relative=False, optionflags=OPTIONS)
    assert ran
    assert not failed


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    failed, ran = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert ran
    assert not failed


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text()), target


def anchors(text: str) -> set[str]:
    """As the forge and the site make them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_lists_what_is_public():
    """A page names each by where it is defined; `dyconvert.__all__` names it by where it is imported from."""
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE))
    for name in dyconvert.__all__:
        value = getattr(dyconvert, name)
        # What is of a kind with another that the page has: the errors, the convs of other dimensions.
        bases = getattr(value, "__mro__", (value,))
        homes = {f"{each.__module__}.{each.__name__}" for each in bases if hasattr(each, "__name__")}
        homes |= {each.__module__ for each in bases if hasattr(each, "__module__")}
        assert not hasattr(value, "__module__") or homes & listed, f"docs/api.md lacks {name}"
