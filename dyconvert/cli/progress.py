"""Shows a command's present step on a line of stderr, and removes it at the end; nothing without a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from dyconvert import console


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show `what`; gives a function that shows the next step: its name, how much is done, and of how much."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        console=console.err,
        transient=True,
        disable=not console.err.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda now, done, total: bar.update(task, description=now, completed=done, total=total)
