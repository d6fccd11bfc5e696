"""What the commands print with: results on stdout, progress and errors on stderr."""

import textwrap

from rich.console import Console
from rich.text import Text

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    # A path is to be copied, so it isn't broken, however long.
    lines = textwrap.fill(
        f"Error: {message}", err.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    err.print(Text.assemble(("Error:", "bold red"), lines.removeprefix("Error:")), soft_wrap=True)


def count(number: float) -> str:
    """25.56 M, 4.09 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
