"""Locks between processes: on a directory while it is written to, and claims on one that a run works in."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl as fcntl  # re-exported: files.py asks whether this system has locks
except ImportError:  # Windows; there, processes that write to one place aren't kept apart
    fcntl = None  # type: ignore[assignment]

# Saving the largest models takes less. A process that hangs isn't waited for forever.
_WAIT_SECONDS = 120.0


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes that use this function from writing to `directory`: they wait.

    Raises:
        TimeoutError: another process has been writing there for two minutes.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _wait_for(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, directory: Path) -> None:
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "another process is writing there", str(directory)) from None
            time.sleep(0.02)
        except OSError:  # this file system has no locks
            return


# Files that this process has claimed: within one process, the system would lock a file twice.
_claimed: set[str] = set()


class Claim:
    """Reserves a directory for one process for a long time, such as a run's. The claim of a process that dies ends.

    The lock is on `file`, which is removed with the claim.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the claim; False: another process, or another claim of this process, has it."""
        key = os.path.realpath(self.file)
        if key in _claimed:
            return False
        if fcntl is not None and not self._locked():
            return False
        _claimed.add(key)
        return True

    def release(self) -> None:
        """Release the claim, if it was taken."""
        key = os.path.realpath(self.file)
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.file.unlink()
            os.close(self._descriptor)
            self._descriptor = None
        _claimed.discard(key)

    def _locked(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        while True:
            descriptor = os.open(self.file, flags, 0o666)
            try:
                # Workers, which may outlive a killed process, don't inherit this lock, as they would flock's.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                if problem.errno not in (errno.EACCES, errno.EAGAIN):
                    self._descriptor = descriptor  # this file system has no locks
                    return True
                os.close(descriptor)
                return False
            # Its holder may have removed the file after it was opened here.
            if self.file.exists() and os.path.samestat(os.fstat(descriptor), self.file.stat()):
                self._descriptor = descriptor
                return True
            os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder for as long as the returned descriptor is open. None: another process has locked it, or this system
    has no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None
