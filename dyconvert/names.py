"""Names in a tree of modules, as `named_modules()` gives them: `""` is the model, a dot goes one module down."""

import fnmatch
from collections.abc import Iterable
from typing import Any

from dyconvert.errors import PlanError


def holds(outer: str, name: str) -> bool:
    """Whether the module called `outer` is, or holds, the one called `name`."""
    return outer in ("", name) or name.startswith(outer + ".")


def within(outer: str, name: str) -> str:
    """The name of the module `name` within `outer`, which holds it."""
    return name[len(outer) + 1 :] if outer else name


def joined(outer: str, name: str) -> str:
    """The whole name of a module that is called `name` within `outer`."""
    return f"{outer}.{name}" if outer and name else outer or name


def matching(patterns: Iterable[str], names: list[str]) -> list[str]:
    """The names that match a shell pattern, or stand inside of a module that matches.

    Raises:
        PlanError: a pattern matches nothing, or is none.
    """
    matched: set[str] = set()
    for pattern in checked_patterns(patterns):
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, pattern + ".*")}
        if not hits:
            examples = ", ".join(names[:3])
            raise PlanError(f"No conv's name matches {pattern!r}. Names look like {examples}; try '*{pattern}*'.")
        matched |= hits
    return [name for name in names if name in matched]


def checked_patterns(patterns: Any) -> list[str]:
    """Shell patterns as a list; one alone is a list of one.

    Raises:
        PlanError: they are none.
    """
    if isinstance(patterns, str):
        return [patterns]
    if not isinstance(patterns, Iterable) or isinstance(patterns, bytes):
        raise PlanError(f"Patterns of names are needed, such as ['layer4.*'], not a {type(patterns).__name__}.")
    listed = list(patterns)
    if odd := [each for each in listed if not isinstance(each, str)]:
        raise PlanError(f"A pattern of names is text, such as 'layer4.*', not a {type(odd[0]).__name__}.")
    return listed
