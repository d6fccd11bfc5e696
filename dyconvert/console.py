"""The terminal: results on stdout, progress and errors on stderr; numbers as people read them."""

import textwrap

from rich.console import Console
from rich.text import Text

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    first, *others = message.splitlines() or [""]
    lines = [_filled(f"Error: {first}"), *map(_filled, others)]
    text = "\n".join(lines).removeprefix("Error:")
    err.print(Text.assemble(("Error:", "bold red"), text), soft_wrap=True)


def _filled(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    # A path is to be copied, so it isn't broken, however long.
    return textwrap.fill(
        line,
        err.width,
        subsequent_indent=indent and indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def count(number: float | None) -> str:
    """25.56 M, 4.09 G; a dash for what isn't known."""
    if number is None:
        return "–"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
