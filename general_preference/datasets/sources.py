"""Reads comparisons from files, folders and the hub, record by record, into a cached Arrow table.

A row is a `Comparison`, or its column `problem` says why not. Edited files (size or modification time) are read again.
"""

import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

from general_preference.datasets import locations
from general_preference.datasets.locations import Location
from general_preference.datasets.readers import file_format, one_line, read_records, read_table, show
from general_preference.datasets.records import parse_record
from general_preference.errors import InputError

logger = logging.getLogger(__name__)

READER_VERSION = 6  # part of the cache key: raise it when the meaning of a row changes
TEXT, FLOAT, INTEGERS = datasets.Value("string"), datasets.Value("float64"), datasets.List(datasets.Value("int32"))
_MESSAGES = datasets.List({"role": TEXT, "content": TEXT})
PREFERENCES = {"first": INTEGERS, "second": INTEGERS, "label": datasets.List(FLOAT), "margin": FLOAT}
_TEXTS = dict.fromkeys(("id", "subset", "problem"), TEXT)
ROW = datasets.Features(_TEXTS | PREFERENCES | {"prompt": _MESSAGES, "responses": datasets.List(_MESSAGES)})


@dataclass(frozen=True)
class Source:
    """One named set of comparisons; `path` is what `locations.locate` takes: a file, a folder, a glob, a hub name."""

    name: str
    path: str

    @property
    def files(self) -> list[Path]:
        """What is read, resolved; for a hub dataset its name with configuration and split.

        Raises:
            InputError: there is no such path, split or configuration.
        """
        location = locations.locate(self.path)
        found = [Path(str(location))] if location.on_hub else locations.find_files(location)[0]
        return [file.resolve() for file in found]


def parse_sources(text: str) -> list[Source]:
    r"""`path,path` or `name=path,name=path` -> sources; InputError for an empty entry, or two sets with one name.

    A path that is there wins over a comma or "=" in it; elsewhere `\,` is a comma of the path. The default name is that
    of the file or folder, preceded by its parent folder where two would be equal.
    """
    sources, unnamed = [], []
    for entry in _entries(text):
        name, path = _split_name(entry)
        if name is None:
            name = _default_name(path)
            unnamed.append(len(sources))
        if not path or not name:
            raise InputError(f"'{show(text)}' has an empty entry: expected path,path or name=path,name=path")
        if show(entry) != entry:
            raise InputError(f"{show(entry)}: the name is not UTF-8, which the saved model and results need: rename it")
        sources.append(Source(name, path))
    if len({source.name for source in sources}) < len(sources):
        for index in unnamed:
            name, path = sources[index].name, sources[index].path
            sources[index] = Source(f"{Path(path).parent.name}/{name}", path)
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two sets are called '{twice[0]}': name each one, as in first={sources[0].path}")
    return sources


def _entries(text: str) -> Iterator[str]:
    pieces = [piece.replace("\\,", ",") for piece in re.split(r"(?<!\\),", text)]
    while pieces:
        joined = {count: ",".join(pieces[:count]).strip() for count in range(len(pieces), 0, -1)}
        count = next((count for count, entry in joined.items() if locations.is_on_disk(_split_name(entry)[1])), 1)
        yield joined[count]
        del pieces[:count]


def _split_name(entry: str) -> tuple[str | None, str]:
    name, separator, path = entry.partition("=")
    named = separator and not set("/,") & set(name) and not locations.is_on_disk(entry)  # a path may contain "="
    return (name, path) if named else (None, entry)


def _default_name(path: str) -> str:
    for part in reversed(Path(path).parts):
        stem = re.sub(r"(\.\w+)(\.gz|\.zst)?$", "", part, flags=re.IGNORECASE) if file_format(part) else part
        if name := re.sub(r"\[.*?\]|[*?]", "", stem).strip("-_.") if glob.has_magic(stem) else stem:
            return name
    return path


def warn_of_shared_files(sources: list[Source]) -> None:
    """One warning for every two sources that read the same file or hub dataset."""
    files = [set(source.files) for source in sources]
    for (first, some), (second, others) in itertools.combinations(zip(sources, files, strict=True), 2):
        if shared := sorted(some & others):
            found = show(shared[0]) + (f" and {len(shared) - 1} more" if len(shared) > 1 else "")
            logger.warning("'%s' and '%s' both read %s: these comparisons count twice", first.name, second.name, found)


def record_location(name: str, index: int, path: str = "") -> str:
    """What a message calls a row: its place in the file if it has no id, else its number and id."""
    shown = name if name.isprintable() else repr(name)
    return name if is_record_location(name) else f"{path}{', ' if path else ''}row {index + 1} (id {shown})"


def is_record_location(name: str) -> bool:
    """Whether an id is the place that was given to a record without one."""
    return bool(re.search(r", (line|record|row) \d+$", name))


def load_source(
    source: Source, custom: bool = False, skip_bad: bool = False, remedy: str = "fix it, or set on_bad_record to skip"
) -> tuple[datasets.Dataset, int]:
    """All comparisons of a source as an Arrow table on disk (columns of `ROW` without `problem`), and records left out.

    Args:
        custom: require the custom format (`is_custom_dataset`). remedy: what the message about a bad record advises.
        skip_bad: leave out (and count) records that do not fit instead of refusing the source.

    Raises:
        InputError: no such file, nothing in it, or a record that does not fit, with file and line.
    """
    location = locations.locate(source.path)
    if location.on_hub:
        files, signature = [], (_load_hub(location)._fingerprint,)
    else:
        files, left_out = locations.find_files(location)
        _announce(source, location, files, left_out)
        signature = tuple(_stat(part) for file in files for part in locations.parts(file))
    arguments = {"location": location, "files": tuple(map(str, files)), "signature": signature}
    arguments |= {"custom": custom, "version": READER_VERSION}
    if next(_rows(**arguments), None) is None:
        raise InputError(f"{show(source.path)} holds no records: check that it is the right file")
    try:
        table = datasets.Dataset.from_generator(_rows, features=ROW, gen_kwargs=arguments, split=datasets.Split.TRAIN)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):  # a file as a whole, which no setting can leave out
            raise InputError(str(error.__cause__)) from error
        raise
    problems = table["problem"][:]
    bad = [index for index, problem in enumerate(problems) if problem]
    if bad and not skip_bad:
        more = f" ({len(bad)} such records in all)" if len(bad) > 1 else ""
        raise InputError(f"{problems[bad[0]]}{more}; {remedy}")
    for index in bad[:5]:
        logger.warning("left out: %s", problems[index])
    if bad:
        table = table.select([index for index, problem in enumerate(problems) if not problem])
    if len(table) == 0:
        raise InputError(f"{show(source.path)} holds no usable record: all {len(bad)} were left out")
    return table.remove_columns("problem"), len(bad)


def _announce(source: Source, location: Location, files: list[Path], left_out: dict[Path, str]) -> None:
    """Log what is read of a folder or glob, and which of its data files are not."""
    if files in ([location.place], [location.place / locations.SAVED]):
        return

    def listed(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    folder = location.place if location.place.is_dir() else Path()
    count = f"{len(files)} file{'s' * (len(files) > 1)} of {show(location.path)}"
    read = listed([_relative(file, folder) for file in files])
    others = listed([f"{_relative(file, folder)} ({reason})" for file, reason in left_out.items()])
    logger.info("%s: %s (%s)%s", source.name, count, read, f"; left out: {others}" if others else "")


def _relative(file: Path, folder: Path) -> str:
    return show(os.path.relpath(file.parent if file.name == locations.SAVED else file, folder))


def _stat(file: Path) -> tuple[str, str, int, int]:
    """What changes with a file. Two may share a relative name, a size and a time: the whole path is part of it."""
    try:
        status = file.stat()
        with file.open("rb"):
            return str(file), str(file.resolve()), status.st_size, status.st_mtime_ns
    except OSError as error:
        raise InputError(f"cannot read {show(file)}: {error.strerror}") from error


def _rows(location: Location, files: tuple[str, ...], signature: tuple, custom: bool, version: int) -> Iterator[dict]:
    """One `ROW` per record; `signature` and `version` only change the cache key."""
    for place, record in _records(location, files):
        yield _row(place, record, custom)


def _records(location: Location, files: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    if location.on_hub:
        yield from read_table(_load_hub(location), str(location))
    for file in map(Path, files):
        if file.name == locations.SAVED:
            yield from read_table(_load_saved(file.parent), show(file.parent))
        else:
            yield from read_records(file)


def _row(place: str, record: object, custom: bool) -> dict:
    try:
        if isinstance(record, InputError):
            raise record
        json.dumps(record, ensure_ascii=False, default=str).encode()
        found = parse_record(record, custom)
    except UnicodeEncodeError:
        problem = f"{place}: not valid Unicode (a byte that is not UTF-8, or half of a surrogate pair)"
    except (ValueError, OverflowError) as error:
        problem = str(error) if error is record else f"{place}: {error}"
    else:
        first, second, label = (list(column) for column in zip(*found.preferences, strict=True))
        columns = {name: getattr(found, name) for name in ("subset", "prompt", "responses", "margin")}
        return columns | {"id": found.id or place, "first": first, "second": second, "label": label, "problem": ""}
    nothing = {name: [] for name in ("prompt", "responses", "first", "second", "label")}
    return nothing | {"id": place, "subset": "", "margin": 0.0, "problem": problem}


def _load_saved(folder: Path) -> datasets.Dataset:
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets has no base for what is wrong with a folder
        raise InputError(f"cannot read {show(folder)} as a saved dataset: {one_line(error)}") from error


def _load_hub(location: Location) -> datasets.Dataset:
    try:
        return datasets.load_dataset(location.path, location.configuration or None, split=location.split)
    except Exception as error:  # network, permission and format errors have no common base
        missing = f"no local path {location.path}{locations.neighbors(location.path)}"
        raise InputError(f"{missing}, and the hub dataset cannot be loaded: {one_line(error)}") from error
