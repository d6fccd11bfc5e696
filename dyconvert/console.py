"""The terminal: results on stdout, progress and errors on stderr; numbers as people read them.

All that is printed comes through here, so one place says what reaches a terminal. Text is printed as it is: rich's
markup and emoji codes stay plain text, since names of files and layers may look like them. Characters that would
control the terminal, and those that its encoding lacks, are written as escapes.
"""

import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Control codes but for the line's end and the tab, and the marks that turn the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# For terminals and files that aren't Unicode.
_PLAIN = str.maketrans({"–": "-", "—": "-", "×": "x", "±": "+-", "→": "->", "…": "...", "≈": "~", "•": "*", "█": "#"})


class Terminal(Console):
    """A console that prints text as it is, and nothing that its stream can't take."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, self.encoding))


out = Terminal()
err = Terminal(stderr=True)


def printable(text: str, encoding: str = "utf-8") -> str:
    """The text without characters that control a terminal or that the encoding lacks: they become escapes."""
    if _CONTROL.search(text):
        text = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        pass
    return text


def write(text: str) -> None:
    """Write text to stdout as it stands, such as a file's contents, without breaking its lines."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(printable(text, encoding))
    sys.stdout.flush()


def in_columns(names: Sequence[str], width: int) -> str:
    """Names in columns, read downwards; rich's take a quarter of a second for a thousand."""
    gap = 2
    sizes = [cell_len(name) + gap for name in names]
    # Fewer rows than this can't hold them all.
    rows = max(sum(sizes) // (width + gap), 1)
    while True:
        widths = [max(sizes[start : start + rows]) for start in range(0, len(sizes), rows)]
        if rows >= len(names) or sum(widths) - gap <= width:
            break
        rows += 1
    lines = (names[row::rows] for row in range(rows))
    return "\n".join("".join(map(set_cell_size, line, widths)).rstrip() for line in lines)


def write_json(content: Any) -> None:
    """Write a command's result to stdout as JSON, which has no NaN and no infinity: they become null."""
    write(json.dumps(_finite(content), indent=2) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def fail(message: str) -> None:
    """Print an error, however quiet the rest is to be."""
    lines = [_filled(line) for line in f"Error: {printable(message)}".splitlines()]
    text = "\n".join(lines).removeprefix("Error:")
    quiet, err.quiet = err.quiet, False
    try:
        err.print(Text.assemble(("Error:", "bold red"), text), soft_wrap=True)
    finally:
        err.quiet = quiet


def warn(message: str) -> None:
    """Print what isn't as it should be, and doesn't keep the command from going on."""
    err.print(Text(_filled(f"warning: {printable(message)}"), style="yellow"), soft_wrap=True)


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
