"""Reads comparisons from files, folders and the hub, record by record, into a cached Arrow table.

A row is a `Comparison`, or its column `problem` says why not. Edited files (size or modification time) are read again.
Messages are stored as role and content; what else a few of them hold is the JSON of the column `extras`.
"""

import functools
import glob
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

from general_preference.datasets import locations
from general_preference.datasets.locations import Location
from general_preference.datasets.messages import Message
from general_preference.datasets.readers import file_format, one_line, read_records, read_table, show
from general_preference.datasets.reading import Reading
from general_preference.datasets.records import Comparison, parse_record
from general_preference.errors import InputError

logger = logging.getLogger(__name__)

READER_VERSION = 7  # part of the cache key: raise it when the meaning of a row changes
TEXT, FLOAT, INTEGERS = datasets.Value("string"), datasets.Value("float64"), datasets.List(datasets.Value("int32"))
_MESSAGES = datasets.List({"role": TEXT, "content": TEXT})
PREFERENCES = {"first": INTEGERS, "second": INTEGERS, "label": datasets.List(FLOAT), "margin": FLOAT}
_TEXTS = dict.fromkeys(("id", "subset", "extras", "reader", "problem"), TEXT)
ROW = datasets.Features(_TEXTS | PREFERENCES | {"prompt": _MESSAGES, "responses": datasets.List(_MESSAGES)})
REMEDY = "fix it, or set on_bad_record to skip"
SHOWN = 5  # records left out that are shown one by one


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


def place_below(source: Source, place: str) -> str:
    """The place of a record without the folders that a source lies in: the same wherever it is copied to."""
    return place.removeprefix(f"{_folder(source.path)}/")


@functools.cache
def _folder(path: str) -> str:
    location = locations.locate(path)
    folder = location.place.parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return "" if location.on_hub else show(folder)


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


@dataclass
class SourceSummary:
    """What one source gave.

    records: how many are used. read_as: how many records were read as what (a public set, or a shape of docs/data.md).
    columns_not_read: text that was left out, and in how many records. left_out: records that did not fit; reasons: why,
    for the first of them.
    """

    name: str
    path: str
    records: int = 0
    read_as: dict[str, int] = field(default_factory=dict)
    columns_not_read: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    reasons: list[str] = field(default_factory=list)

    def count_columns(self, readers: list[str]) -> None:
        """Count what the column `reader` of records says: the reader, then the columns it left out, a line each."""
        for text, count in Counter(readers).items():
            name, *unread = text.split("\n")
            self.read_as[name] = self.read_as.get(name, 0) + count
            for column in unread:
                self.columns_not_read[column] = self.columns_not_read.get(column, 0) + count

    def __str__(self) -> str:
        def counted(counts: dict[str, int]) -> str:
            return ", ".join(name if count == most else f"{name} ({count})" for name, count in counts.items())

        most = sum(self.read_as.values())
        text = f"{self.name}: {most} record{'s' * (most > 1)} of {self.path} read as {counted(self.read_as)}"
        text += f"; columns not read: {counted(self.columns_not_read)}" if self.columns_not_read else ""
        return text + (f"; left out: {self.left_out}" if self.left_out else "")


def load_source(
    source: Source, reading: Reading | None = None, skip_bad: bool = False, remedy: str = REMEDY
) -> tuple[datasets.Dataset, SourceSummary]:
    """All comparisons of a source as an Arrow table on disk.

    Args:
        reading: how columns are read. remedy: what the message about a bad record advises.
        skip_bad: leave out (and count) records that do not fit instead of refusing the source.

    Returns:
        The columns of `ROW` without `reader` and `problem`; what was read and left out.

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
    arguments |= {"reading": reading or Reading(), "version": READER_VERSION}
    if next(_rows(**arguments), None) is None:
        raise InputError(f"{show(source.path)} holds no records: check that it is the right file")
    try:
        table = datasets.Dataset.from_generator(_rows, features=ROW, gen_kwargs=arguments, split=datasets.Split.TRAIN)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):  # a file as a whole, which no setting can leave out
            raise InputError(str(error.__cause__)) from error
        raise
    table, problems = without_bad_rows(table, source.path, skip_bad, remedy)
    summary = SourceSummary(
        source.name, show(source.path), len(table), left_out=len(problems), reasons=problems[:SHOWN]
    )
    summary.count_columns(table["reader"][:])
    return table.remove_columns("reader"), summary


def without_bad_rows(
    table: datasets.Dataset, path: str, skip_bad: bool, remedy: str = REMEDY
) -> tuple[datasets.Dataset, list[str]]:
    """(the table's rows whose column `problem` is empty, without that column; the other rows' problems).

    Raises:
        InputError: a row has a problem and `skip_bad` is off, or no row is without one.
    """
    problems = table["problem"][:]
    bad = [problem for problem in problems if problem]
    if bad and not skip_bad:
        more = f" ({len(bad)} such records in all)" if len(bad) > 1 else ""
        raise InputError(f"{bad[0]}{more}; {remedy}")
    for problem in bad[:SHOWN]:
        logger.warning("left out: %s", problem)
    if len(bad) == len(table):
        raise InputError(f"{show(path)} holds no usable record: all {len(bad)} were left out, the first: {bad[0]}")
    if bad:
        table = table.select([index for index, problem in enumerate(problems) if not problem])
    return table.remove_columns("problem"), bad


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


def _rows(
    location: Location, files: tuple[str, ...], signature: tuple, reading: Reading, version: int
) -> Iterator[dict]:
    """One `ROW` per record; `signature` and `version` only change the cache key."""
    for place, record in _records(location, files):
        yield _row(place, record, reading)


def source_records(source: Source) -> Iterator[tuple[str, object]]:
    """(place, decoded record or the InputError that says why there is none) of all that a source holds, of any shape.

    Raises:
        InputError: no such path, or a file that cannot be read.
    """
    location = locations.locate(source.path)
    files: list[Path] = []
    if not location.on_hub:
        files, left_out = locations.find_files(location)
        _announce(source, location, files, left_out)
    yield from _records(location, tuple(map(str, files)))


def _records(location: Location, files: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    if location.on_hub:
        yield from read_table(_load_hub(location), str(location))
    for file in map(Path, files):
        if file.name == locations.SAVED:
            yield from read_table(_load_saved(file.parent), show(file.parent))
        else:
            yield from read_records(file)


def _row(place: str, record: object, reading: Reading) -> dict:
    try:
        if isinstance(record, InputError):
            raise record
        found = parse_record(record, reading)
        extras, reader = _extras(found), "\n".join([found.reader, *found.unread])
        messages = itertools.chain(found.prompt, *found.responses)
        texts = (text for message in messages for text in (message["role"], message["content"]))
        "".join([found.id, found.subset, extras, reader, *texts]).encode()
    except UnicodeEncodeError:
        problem = f"{place}: not valid Unicode (a byte that is not UTF-8, or half of a surrogate pair)"
    except (ValueError, OverflowError) as error:
        problem = str(error) if error is record else f"{place}: {error}"
    else:
        first, second, label = (list(column) for column in zip(*found.preferences, strict=True))
        columns = {name: getattr(found, name) for name in ("subset", "prompt", "responses", "margin")}
        columns |= {"extras": extras, "reader": reader, "problem": ""}
        return columns | {"id": found.id or place, "first": first, "second": second, "label": label}
    nothing = {name: [] for name in ("prompt", "responses", "first", "second", "label")}
    return nothing | {"id": place, "subset": "", "margin": 0.0, "extras": "", "reader": "", "problem": problem}


def _extras(found: Comparison) -> str:
    """What the columns of messages cannot hold, as JSON: variables of the chat template, and fields of messages."""
    messages = [found.prompt, *found.responses]
    if not found.options and all(len(message) == 2 for some in messages for message in some):
        return ""
    fields = [[{key: m[key] for key in m if key not in ("role", "content")} for m in some] for some in messages]
    return json.dumps({"options": found.options, "fields": fields}, ensure_ascii=False)


def whole_messages(
    prompt: list[Message], responses: list[list[Message]], extras: str
) -> tuple[list[Message], list[list[Message]], dict]:
    """(prompt, responses, variables of the chat template) from three columns of `ROW`."""
    if not extras:
        return prompt, responses, {}
    values = json.loads(extras)
    prompt, *responses = [
        [message | more for message, more in zip(some, fields, strict=True)]
        for some, fields in zip([prompt, *responses], values["fields"], strict=True)
    ]
    return prompt, responses, values["options"]


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
