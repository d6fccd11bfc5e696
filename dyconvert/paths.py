"""Paths that users give, and names of files as text."""

import os
from pathlib import Path
from typing import Any

from dyconvert.errors import DyconvertError

Error = type[DyconvertError]


def as_path(place: Any, error: Error) -> Path:
    """A path that the user passed.

    Raises:
        error: it is none.
    """
    if not isinstance(place, str | os.PathLike) or isinstance(os.fspath(place), bytes):
        raise error(
            f"A path has to be text or a pathlib.Path, not a {type(place).__name__}. Give one, such as 'saved'."
        )
    if "\0" in os.fspath(place):
        raise error(f"{os.fspath(place)!r:.80} can't be a path: it has the character of the number 0. Give another.")
    return Path(place)


def shown(name: str) -> str:
    """The name of a file as text: it may have bytes that are none, which Python keeps as halves of characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def current_folder(error: Error) -> Path:
    """The current folder.

    Raises:
        error: it was deleted.
    """
    try:
        return Path.cwd()
    except OSError:
        raise error("The current folder was deleted. Change to one that exists, and try again.") from None
