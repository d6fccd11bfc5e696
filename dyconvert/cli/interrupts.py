"""Ctrl-C at any moment: one line, exit code 130, and no traceback.

An exception can't end every moment. One that is raised while a module is imported may be turned into another by a
library, or be printed and forgotten where Python runs callbacks. So within an import the process ends at once, unless
one of ours is writing a file. Elsewhere KeyboardInterrupt is raised, so that what is half-written is taken away.
"""

import _thread
import atexit
import os
import signal
import sys

TYPE_CHECKING = False  # this is the first module that runs, and typing takes longer than all of it

if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

CODE = 130
MESSAGE = "Stopped. Nothing half-written was left."
# The modules that write files, and remove half-written ones.
_WRITERS = ("saving.py", "files.py", "exported.py", "write.py")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

_process = 0
_seen = False


class TakenOver:
    """Within this context, Ctrl-C is handled as above; in a thread that isn't the main one, as it was before."""

    def __enter__(self) -> None:
        global _process, _seen
        _process, _seen = os.getpid(), False
        self.hook = sys.unraisablehook
        try:
            self.before = signal.signal(signal.SIGINT, _handle)
        except ValueError:  # not the main thread
            self.before = None
            return
        sys.unraisablehook = _unraisable

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self.hook
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            # All is done: while Python shuts down there is nothing to stop. What is registered last runs first.
            atexit.unregister(_ignore)
            atexit.register(_ignore)


def seen() -> bool:
    """Whether there was a Ctrl-C: an error that comes after it is its consequence."""
    return _seen


def _ignore() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _handle(number: int, frame: "FrameType | None") -> None:
    global _seen
    if os.getpid() != _process:
        os._exit(CODE)  # a worker: the terminal sends Ctrl-C to all, and the first process says so
    # The second one ends what the first one couldn't.
    if _seen or _importing(frame):
        _exit()
    _seen = True
    raise KeyboardInterrupt


def _importing(frame: "FrameType | None") -> bool:
    importing = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and name.endswith(_WRITERS):
            return False
        importing = importing or name == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return importing


def _exit() -> None:
    # Only what can't fail or wait: the interrupted code may hold any lock.
    # A progress bar hides the cursor.
    shown = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    try:
        os.write(2, f"{shown}Error: {MESSAGE}\n".encode())
    finally:
        os._exit(CODE)


def _unraisable(unraisable: "Any") -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _thread.interrupt_main()  # it was raised in a callback, where Python can only print it
        return
    sys.__unraisablehook__(unraisable)
