"""Files and folders that survive a stop: locked by one run, replaced whole, never half-written."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from general_preference.errors import InputError, RunError


def lock_folder(folder: Path, name: str):
    """Make the folder that the argument `name` gives and lock it; closing the returned file unlocks it.

    Raises:
        InputError: the folder cannot be made or written, or another running process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"{name} {folder} cannot be written ({error.strerror}): choose another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"{name} {folder} is being written by another run: wait for it, or choose another"
        raise InputError(message) from error
    except OSError:  # a file system without locks
        pass
    return lock


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: an OSError becomes a RunError that names it and the reason."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part."""
    replace_lines(path, [text])


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file line by line (without their line ends) so that a reader sees all of it or nothing new.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def flush_folder(folder: Path) -> None:
    """Have the disk hold a folder's entries (new files, renames), not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # network file systems may refuse it for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
