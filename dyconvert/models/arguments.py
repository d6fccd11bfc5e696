"""Model arguments as they are written on a command line."""

import ast
from collections.abc import Iterable
from typing import Any

from dyconvert.errors import ModelError


def parse_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Read model arguments from `name=value` strings: Python literals, true, false, otherwise strings.

    Raises:
        ModelError: a pair has no `=`, its name isn't an identifier, or a name is given twice.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not name.isidentifier():
            raise ModelError(f"The model argument {pair!r} isn't of the form name=value, as num_classes=10 is.")
        if name in arguments:
            raise ModelError(f"The model argument {name!r} is given twice; give it once.")
        try:
            arguments[name] = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[name] = text
    return arguments
