"""Whether to measure, and the measured choices of this process."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from dyconvert.errors import DyconvertError
from dyconvert.nn.measured_choices import MODES, Choices


def cache_folder() -> Path:
    """Where choices are kept: `DYCONVERT_CACHE`, or `dyconvert` in the user's cache directory."""
    if named := os.environ.get("DYCONVERT_CACHE"):
        return Path(named) / "choices"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        base = Path(local)
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return base.expanduser() / "dyconvert" / "choices"


_of_process: Choices | None = None
_current: ContextVar[Choices | None] = ContextVar("choices", default=None)
_mode: ContextVar[str | None] = ContextVar("whether to measure", default=None)


def current() -> Choices:
    """The choices that dynamic convs look up here: those of :func:`using`, or the process's."""
    global _of_process
    if (choices := _current.get()) is not None:
        return choices
    if _of_process is None:
        _of_process = Choices(cache_folder())
    return _of_process


@contextmanager
def using(choices: Choices) -> Iterator[Choices]:
    """Within it, dynamic convs of this thread look up and add to `choices` instead of the process's."""
    token = _current.set(choices)
    try:
        yield choices
    finally:
        _current.reset(token)


@contextmanager
def measuring(mode: str) -> Iterator[None]:
    """Within it, whether dynamic convs of this thread may measure; stronger than `DYCONVERT_MEASURE`.

    Args:
        mode: "on": a shape that isn't known yet is measured; "read-only": it is looked up, and what isn't known goes
            by rule; "off": all go by rule.

    Raises:
        DyconvertError: there is no such mode.
    """
    token = _mode.set(_checked(mode, "measuring()"))
    try:
        yield
    finally:
        _mode.reset(token)


def mode() -> str:
    """Whether to measure: as :func:`measuring` says, or the environment variable `DYCONVERT_MEASURE`, or "on"."""
    return _mode.get() or _checked(os.environ.get("DYCONVERT_MEASURE") or "on", "The environment's DYCONVERT_MEASURE")


def _checked(mode: str, where: str) -> str:
    mode = {"1": "on", "0": "off"}.get(mode, mode)
    if mode not in MODES:
        raise DyconvertError(f"{where} says {mode!r}, which is no mode. The modes are {', '.join(MODES)}.")
    return mode
