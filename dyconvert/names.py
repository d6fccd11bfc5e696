"""Names in a tree of modules, as `named_modules()` gives them: `""` is the model, a dot goes one module down."""

import fnmatch
from collections.abc import Iterable

from dyconvert.errors import PlanError


def holds(outer: str, name: str) -> bool:
    """Whether the module called `outer` is, or holds, the one called `name`."""
    return outer in ("", name) or name.startswith(outer + ".")


def within(outer: str, name: str) -> str:
    """What the module called `name` is called within `outer`, which holds it."""
    return name[len(outer) + 1 :] if outer else name


def joined(outer: str, name: str) -> str:
    """The whole name of what is called `name` within `outer`."""
    return f"{outer}.{name}" if outer and name else outer or name


def matching(patterns: Iterable[str], names: list[str]) -> list[str]:
    """The names that match a shell pattern, or stand inside of a module that matches.

    Raises:
        PlanError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, pattern + ".*")}
        if not hits:
            examples = ", ".join(names[:3])
            raise PlanError(f"No conv's name matches {pattern!r}. Names look like {examples}; try '*{pattern}*'.")
        found |= hits
    return [name for name in names if name in found]
