"""Files and folders that survive: inputs are never written over, runs do not mix, nothing is left half-written."""

import contextlib
import errno
import fcntl
import fnmatch
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from general_preference.errors import InputError, RunError


def check_outputs(outputs: dict[Path, str], read: Iterable[str], data: Iterable[str] = ()) -> None:
    """Refuse outputs that are or contain what is read, or that lie in a folder of data, which is read whole.

    Args:
        outputs: {file or folder that will be written: the argument that names it}.
        read: paths of models and files, or hub names. data: of data, also patterns and `path:configuration@split`.

    Raises:
        InputError: names both, however they are spelled (links, `..`, `~`).
    """
    inputs = [(path, place, False) for path in read for place in _places(path)]
    inputs += [(path, place, True) for path in data for place in _places(path)]
    for output, name in outputs.items():
        for path, place, searched in inputs:
            problem = ""
            if _lies_in(place, output) if place.exists() else place.resolve() == output.resolve():
                problem = "is" if place.resolve() == output.resolve() else "contains"
            elif searched and ((place.is_dir() and _lies_in(output, place)) or _matches(output, path)):
                problem = "would be written into"
            if problem:
                raise InputError(f"{name} {output} {problem} {path}, which is read: choose another place to write to")


def check_new_folder(output: Path, read: Iterable[str]) -> None:
    """InputError if a folder to be made by `new_folder` holds something already, or is or contains what is read."""
    check_outputs({output: "output", _unfinished(output): "output"}, read)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty: choose another folder, or remove it")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which becomes `output` at the end; what fails or stops leaves none.

    Raises:
        InputError: another process makes it. RunError: it cannot be written.
    """
    temporary = _unfinished(output)
    with writing(output), lock_folder(temporary, "output") as lock:
        for left in temporary.iterdir():  # by a process that was killed
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != Path(lock.name).name:
                left.unlink()
        try:
            yield temporary
            Path(lock.name).unlink()
            if output.is_dir():
                output.rmdir()
            temporary.rename(output)
        except BaseException:  # a full disk should get its space back
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _unfinished(output: Path) -> Path:
    return output.with_name(f".writing_{output.name}")


def _places(path: str) -> list[Path]:
    """What a path stands for: itself, what its pattern finds or what is before its split, and the links inside."""
    path = os.path.expanduser(path)
    bare = re.sub(r"(:[^/:@]*)?(@[^/@]*)?$", "", path) or path
    found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True) or [bare]
    found = list(map(Path, found))
    return found + [link for place in found if place.is_dir() for link in place.rglob("*") if link.is_symlink()]


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or in it, also where a mount, or upper case that does not count, spells it apart."""
    inner, outer = inner.resolve(), outer.resolve()
    if inner.is_relative_to(outer):
        return True
    return outer.exists() and any(place.exists() and place.samefile(outer) for place in (inner, *inner.parents))


def _matches(output: Path, pattern: str) -> bool:
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(pattern)))
    whole = os.path.join(os.path.realpath(folder), name)
    return glob.has_magic(pattern) and fnmatch.fnmatch(os.path.realpath(output), whole)


def lock_folder(folder: Path, name: str):
    """Make the folder that the argument `name` gives and lock it; closing the returned file unlocks it.

    Raises:
        InputError: the folder cannot be made or written, or another running process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
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
    """Around what writes `path`: what the disk refuses becomes a RunError that names it and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def read_object(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
