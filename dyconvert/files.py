"""Writing files and directories: the old or the new, whole. Only our own files are replaced, never through a link.

Everything is written into a private folder beside its place, put onto the disk, and then takes its name by a rename,
which is one step. A killed process leaves such a folder; the next one that writes to that place removes it.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dyconvert.errors import DyconvertError, some

try:
    import fcntl
except ImportError:  # Windows; there, writers to one place aren't kept apart
    fcntl = None  # type: ignore[assignment]

# The prefix of private folders. A name this long isn't met by chance.
_PRIVATE = ".dyconvert-part-"
# Saving the largest models takes less, and a process that hangs isn't waited for forever.
_WAIT_SECONDS = 120.0

Error = type[DyconvertError]


# ---- One file ----


@contextlib.contextmanager
def replaced(file: Path, error: Error) -> Iterator[Path]:
    """A place to write `file` to, from which it is moved to its own at the end; after an error nothing is left.

    What stands beside it there, such as `<file>.data`, is moved with it, first. A link is replaced, not followed.

    Raises:
        error: it can't be written. What was there is unchanged.
    """
    if file.is_dir():
        raise error(f"{file} is a directory. Name a file.")
    with said(file, error):
        file.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(file.parent) as folder:
            yield folder / file.name
            made = sorted(folder.iterdir(), key=lambda each: each.name == file.name)
            for each in made:
                settle(each)
            for each in made:
                os.replace(each, file.parent / each.name)


def write_file(file: Path, content: str | bytes, error: Error) -> None:
    """Write a small file, in one step.

    Raises:
        error: it can't be written. What was there is unchanged.
    """
    with replaced(file, error) as part:
        part.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def check_free(file: Path, force: bool, error: Error) -> None:
    """Refuse a file that exists, before the work is done.

    Raises:
        error: it exists, and isn't to be replaced; or it is no file.
    """
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as problem:
        raise error(f"{file} can't be used: {problem}. Choose another file.") from None
    if file.is_dir():
        raise error(f"{file} is a directory. Name a file.")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise error(f"{file} is no ordinary file. Choose another file.")
    if not force:
        raise error(f"{file} exists already. Replace it with `force=True`, or choose another file.")


# ---- A directory ----


def replace_directory(made: Path, directory: Path, ours: Iterable[str], error: Error) -> None:
    """Put the files of `made` in the place of what we wrote into `directory` before.

    Where the directory holds nothing but ours, the two change places in one step, where the system can do that.
    Otherwise each file is replaced in one step, those at the top last, and others' files stay.

    Args:
        made: a folder on the same disk; what was replaced may be left in it.
        ours: relative paths of what an earlier call put there.

    Raises:
        error: others' files have the names of new ones. Nothing was changed.
    """
    new = _files(made)
    for each in new:
        settle(made / each)
    directory = Path(os.path.realpath(directory))
    if not directory.exists():
        os.replace(made, directory)
        return
    with locked(directory):
        old = {name for name in ours if _is_plain(directory, name)}
        if set(_files(directory)) <= old and _exchange(made, directory):
            return
        if theirs := [name for name in new if os.path.lexists(directory / name) and name not in old]:
            raise error(
                f"{directory} holds {some(theirs)}, which dyconvert didn't write and would have to replace. Move it, "
                "or choose another directory."
            )
        for name in new:
            target = _without_links(directory, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / name, target)
        for name in old - set(new):
            (directory / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: others' files are in it
                (directory / name).parent.rmdir()


def _files(folder: Path) -> list[str]:
    """What is in a folder and below it, as relative paths; links and odd things too. Private folders are nothing."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = [name for name in folders if not name.startswith(_PRIVATE)]
        if not (names or folders) and Path(parent) != folder:
            found.append(os.path.relpath(parent, folder))
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in (*names, *links)]
    return sorted(found, key=lambda name: (-name.count(os.sep), name))


def _is_plain(directory: Path, name: str) -> bool:
    """Whether `name` is a file of the directory itself: not above it, nor reached through a link."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        return False
    folders = [directory.joinpath(*parts[:depth]) for depth in range(1, len(parts))]
    return not any(folder.is_symlink() for folder in folders) and (directory / name).is_file()


def _without_links(directory: Path, name: str) -> Path:
    """The path of `name` in the directory, the folders on the way to it being no links any more."""
    parts = Path(name).parts
    for depth in range(1, len(parts)):
        folder = directory.joinpath(*parts[:depth])
        if folder.is_symlink():
            folder.unlink()
    return directory / name


def _exchange(first: Path, second: Path) -> bool:
    """Let two directories change names, in one step. False: this system can't."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


# ---- A folder of our own for what isn't complete ----


@contextlib.contextmanager
def private_folder(place: Path) -> Iterator[Path]:
    """A new folder in `place` that is removed at the end, and if this process is killed, by the next one."""
    remove_leftovers(place)
    folder, lock = _made(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def held(directory: Path) -> set[str]:
    """What a directory holds, by name; private folders are nothing, be they a dead process's or one's at work."""
    return {name for name in os.listdir(directory) if not name.startswith(_PRIVATE)}


def remove_leftovers(place: Path) -> None:
    """Remove private folders of processes that have died."""
    try:
        names = [name for name in os.listdir(place) if name.startswith(_PRIVATE)]
    except OSError:
        return
    for name in names:
        folder = place / name
        if folder.is_symlink() or (lock := _lock(folder)) is None:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _made(place: Path) -> tuple[Path, int | None]:
    while True:
        folder = place / f"{_PRIVATE}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        if fcntl is None:
            return folder, None
        lock = _lock(folder)
        # Before it was locked, another process may have taken it for a dead one's.
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as the returned descriptor is open. None: another process has, or nothing can be."""
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


def settle(path: Path) -> None:
    """Put a file onto the disk, with the permissions that the user's umask gives; or all files of a folder."""
    if path.is_dir():
        for each in path.iterdir():
            settle(each)
        return
    probe = path.with_name(path.name + ".mode")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    # safetensors gives its files 0600.
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


# ---- One writer at a time ----


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Write to `directory` alone among processes; others wait.

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
        except OSError:  # a file system that has no locks
            return


# Of this process, in which a lock of the system's on the same file would be given twice.
_claimed: set[str] = set()


class Claim:
    """A directory that one process works in for long, such as a run's. A process that has died claims nothing.

    The lock is on a file of its own, which goes away with the claim.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Whether it is ours now; False: another process, or another run of this one, has it."""
        key = os.path.realpath(self.file)
        if key in _claimed:
            return False
        if fcntl is not None and not self._locked():
            return False
        _claimed.add(key)
        return True

    def release(self) -> None:
        """Give it back; without effect where it wasn't taken."""
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
                # Unlike flock's, this lock isn't inherited by workers, which may outlive a killed process.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                if problem.errno not in (errno.EACCES, errno.EAGAIN):
                    self._descriptor = descriptor  # a file system that has no locks
                    return True
                os.close(descriptor)
                return False
            # It may have been removed by its holder after it was opened here.
            if self.file.exists() and os.path.samestat(os.fstat(descriptor), self.file.stat()):
                self._descriptor = descriptor
                return True
            os.close(descriptor)


# ---- What is said ----


@contextlib.contextmanager
def said(place: Path, error: Error) -> Iterator[None]:
    """Turn the system's errors into one of ours that names the place and the reason."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as problem:
        # torch.save has no type of its own for a full disk.
        if isinstance(problem, RuntimeError) and not re.search("inline_container|iostream", str(problem)):
            raise
        reason = getattr(problem, "strerror", None) or str(problem).splitlines()[0]
        raise error(
            f"{place} can't be written: {reason}. Free some space or choose another place; what was there is unchanged."
        ) from problem


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
