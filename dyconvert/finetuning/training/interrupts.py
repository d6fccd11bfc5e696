"""Handles Ctrl-C and SIGTERM: the run ends after the current step, when its state is saved."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """The run was stopped on request, and saved."""


class Interrupts:
    """In its `with` block, a first Ctrl-C (or SIGTERM) requests a stop, and a second one ends the process at once.

    Attributes:
        requested: the user wants to stop.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.requested = False
        self._report = report
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Only the main thread may set handlers. In another thread, an interrupt ends the run without saving.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.requested = True
        self._report("stopping after this step, or after the validation; once more to stop at once")
