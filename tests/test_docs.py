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
MODULES = ("dyconvert", "dyconvert.models.preprocess", "dyconvert.nn.convs")


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
    """A page names each function and class by where it is defined; the face names it in one place."""
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE))
    for name in dyconvert.__all__:
        value = getattr(dyconvert, name)
        if not (callable(value) and hasattr(value, "__module__")):
            continue
        home = f"{value.__module__}.{value.__name__}"
        known = home in listed or value.__module__ in listed
        assert known or issubclass(value, tuple(OF_ANOTHER)), f"docs/api.md lacks {home}"


# What stands on the page with what it belongs to.
OF_ANOTHER = ()
