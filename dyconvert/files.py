"""Writes files and directories in one step: either the old or the new one is there, and complete. Only files that
dyconvert wrote are replaced, never through a link.

Everything is written into a private folder beside its place, put onto the disk, and then renamed, which is one step. A
killed process leaves such a folder; the next process that writes to that place removes it.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from dyconvert.errors import DyconvertError, some
from dyconvert.locks import fcntl, lock_folder, locked

# The prefix of private folders: no other folder is likely to have it.
_PRIVATE = ".dyconvert-part-"

Error = type[DyconvertError]


# ---- One file ----


@contextlib.contextmanager
def replaced(file: Path, error: Error) -> Iterator[Path]:
    """Yields a path to write to; at the end that file replaces `file`. After an error nothing is left.

    Files written beside it, such as `<file>.data`, are moved too, before it. A link is replaced, not followed.

    Raises:
        error: it can't be written. What was there is unchanged.
    """
    if file.is_dir():
        raise error(f"{file} is a directory. Name a file.")
    with write_errors_as(file, error):
        file.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(file.parent) as folder:
            yield folder / file.name
            written = sorted(folder.iterdir(), key=lambda path: path.name == file.name)
            for path in written:
                settle(path)
            for path in written:
                os.replace(path, file.parent / path.name)


def write_file(file: Path, content: str | bytes, error: Error) -> None:
    """Write a small file, in one step.

    Raises:
        error: it can't be written. What was there is unchanged.
    """
    with replaced(file, error) as place:
        place.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def check_free(file: Path, force: bool, error: Error) -> None:
    """Check that a file may be written, before the work is done.

    Raises:
        error: it exists and `force` is false; or it is no file.
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


def replace_directory(complete: Path, directory: Path, ours: Iterable[str], error: Error) -> None:
    """Replace the files that dyconvert wrote into `directory` before by those of `complete`.

    If the directory holds only dyconvert's files, and the system can do it, the two directories change names in one
    step. Otherwise each file is replaced in one step, those at the top last, and other files stay.

    Args:
        complete: a folder on the same disk. Replaced files may be left in it.
        ours: relative paths of the files that an earlier call wrote.

    Raises:
        error: new files have the names of files that dyconvert didn't write. Nothing was changed.
    """
    new = _files(complete)
    for name in new:
        settle(complete / name)
    directory = Path(os.path.realpath(directory))
    if not directory.exists():
        os.replace(complete, directory)
        return
    with locked(directory):
        old = {name for name in ours if _is_plain(directory, name)}
        if set(_files(directory)) <= old and _exchange(complete, directory):
            return
        if theirs := [name for name in new if os.path.lexists(directory / name) and name not in old]:
            raise error(
                f"{directory} holds {some(theirs)}, which dyconvert didn't write and would have to replace. Move it, "
                "or choose another directory."
            )
        for name in new:
            target = _without_links(directory, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(complete / name, target)
        for name in old - set(new):
            (directory / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: others' files are in it
                (directory / name).parent.rmdir()


def _files(folder: Path) -> list[str]:
    """Relative paths of all files, links and empty folders in a folder and below it, except private folders."""
    paths = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = [name for name in folders if not name.startswith(_PRIVATE)]
        if not (names or folders) and Path(parent) != folder:
            paths.append(os.path.relpath(parent, folder))
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in (*names, *links)]
    return sorted(paths, key=lambda name: (-name.count(os.sep), name))


def _is_plain(directory: Path, name: str) -> bool:
    """Whether `name` is a file in the directory, not above it and not reached through a link."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        return False
    folders = [directory.joinpath(*parts[:depth]) for depth in range(1, len(parts))]
    return not any(folder.is_symlink() for folder in folders) and (directory / name).is_file()


def _without_links(directory: Path, name: str) -> Path:
    """The path of `name` in the directory. Links in place of the folders on the way to it are removed."""
    parts = Path(name).parts
    for depth in range(1, len(parts)):
        folder = directory.joinpath(*parts[:depth])
        if folder.is_symlink():
            folder.unlink()
    return directory / name


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step. False: this system can't."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


# ---- A private folder for incomplete files ----


@contextlib.contextmanager
def private_folder(place: Path) -> Iterator[Path]:
    """Yields a new folder in `place`. It is removed at the end; if this process is killed, the next process does it."""
    remove_leftovers(place)
    folder, lock = _make_folder(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def names_in(directory: Path) -> set[str]:
    """The names in a directory, without private folders."""
    return {name for name in os.listdir(directory) if not name.startswith(_PRIVATE)}


def remove_leftovers(place: Path) -> None:
    """Remove private folders of processes that have died."""
    try:
        names = [name for name in os.listdir(place) if name.startswith(_PRIVATE)]
    except OSError:
        return
    for name in names:
        folder = place / name
        if folder.is_symlink() or (lock := lock_folder(folder)) is None:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_folder(place: Path) -> tuple[Path, int | None]:
    while True:
        folder = place / f"{_PRIVATE}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        if fcntl is None:
            return folder, None
        lock = lock_folder(folder)
        # Before it was locked, another process may have removed it as one that a dead process left.
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def settle(path: Path) -> None:
    """Put a file, or all files of a folder, onto the disk, with the permissions of the user's umask."""
    if path.is_dir():
        for child in path.iterdir():
            settle(child)
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


# ---- Errors ----


@contextlib.contextmanager
def write_errors_as(place: Path, error: Error) -> Iterator[None]:
    """Raises the system's errors as `error`, with the place and the reason."""
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
