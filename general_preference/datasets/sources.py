"""Reads comparisons from files, folders and the hub, record by record, into a cached Arrow table.

A row is a `Comparison`, or its column `problem` says why not. Edited files (size or modification time) are read again.
"""

import csv
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from general_preference.datasets.records import parse_record
from general_preference.errors import InputError

logger = logging.getLogger(__name__)

READER_VERSION = 5  # part of the cache key: raise it when the meaning of a row changes
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SAVED = "state.json"  # marks a folder written by `Dataset.save_to_disk`
TEXT, FLOAT, INTEGERS = datasets.Value("string"), datasets.Value("float64"), datasets.List(datasets.Value("int32"))
_MESSAGES = datasets.List({"role": TEXT, "content": TEXT})
PREFERENCES = {"first": INTEGERS, "second": INTEGERS, "label": datasets.List(FLOAT), "margin": FLOAT}
_TEXTS = dict.fromkeys(("id", "subset", "problem"), TEXT)
ROW = datasets.Features(_TEXTS | PREFERENCES | {"prompt": _MESSAGES, "responses": datasets.List(_MESSAGES)})


@dataclass(frozen=True)
class Source:
    """One named set of comparisons: a file, a folder, or a hub dataset (`owner/name` or `owner/name@split`)."""

    name: str
    path: str


def parse_sources(text: str) -> list[Source]:
    """`path,path` or `name=path,name=path` -> sources; InputError for an empty entry, or two sets with one name.

    The default name is that of the file or folder, preceded by its parent folder where two would be equal.
    """
    sources, unnamed = [], []
    for entry in map(str.strip, text.split(",")):
        name, separator, path = entry.partition("=")
        if not separator or "/" in name or Path(entry).exists():  # a path may contain "="
            path, name = entry, Path(entry).stem if Path(entry).suffix in SUFFIXES else Path(entry).name
            unnamed.append(len(sources))
        if not path or not name:
            raise InputError(f"'{text}' has an empty entry: expected path,path or name=path,name=path")
        sources.append(Source(name, path))
    if len({source.name for source in sources}) < len(sources):
        for index in unnamed:
            name, path = sources[index].name, sources[index].path
            sources[index] = Source(f"{Path(path).parent.name}/{name}", path)
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two sets are called '{twice[0]}': name each one, as in first={sources[0].path}")
    return sources


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
    # Two files may share a relative name, a size and a time: the whole path is part of the key.
    signature = [(str(file), str(file.resolve()), *_stat(file)) for file in _files(source.path)]
    signature = signature or [(source.path, _load_table(Path(source.path), source.path)._fingerprint)]
    arguments = {"path": source.path, "signature": signature, "custom": custom, "version": READER_VERSION}
    if next(_rows(**arguments), None) is None:
        raise InputError(f"{source.path} holds no records: check that it is the right file")
    table = datasets.Dataset.from_generator(_rows, features=ROW, gen_kwargs=arguments, split=datasets.Split.TRAIN)
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
        raise InputError(f"{source.path} holds no usable record: all {len(bad)} were left out")
    return table.remove_columns("problem"), len(bad)


def _files(path: str) -> list[Path]:
    """The files behind a path, or the `SAVED` file of a folder of datasets; none for a hub name."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise InputError(f"{path} ends in '{place.suffix}': expected {', '.join(SUFFIXES)}, a folder or a hub name")
        return [place]
    if place.is_dir():
        if (place / "dataset_dict.json").is_file() and not (place := place / "train").is_dir():  # as for a hub dataset
            raise InputError(f"{path} has no split 'train': give the folder of a split, as in {path}/test")
        if (place / SAVED).is_file():
            return [place / SAVED]
        found = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and not file.name.startswith("."))
        if not found:
            raise InputError(f"folder {path} holds no {', '.join(SUFFIXES)} file")
        return found
    if place.is_absolute() or path.startswith((".", "~")) or place.suffix in SUFFIXES or path.count("/") != 1:
        raise InputError(f"dataset {path} does not exist: check the path")
    return []


def _stat(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
        with file.open("rb"):
            return status.st_size, status.st_mtime_ns
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _rows(path: str, signature: list, custom: bool, version: int) -> Iterator[dict]:
    """One `ROW` per record; `version` only changes the cache key."""
    for name, *_ in signature:
        for place, record in _records(Path(name), path):
            yield _row(place, record, custom)


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


def _records(file: Path, path: str) -> Iterator[tuple[str, object]]:
    """Yield (place, decoded record or the InputError that says why there is none). A hub name counts as a file."""
    try:
        if file.suffix == ".csv":
            yield from _csv_records(file)
        elif file.suffix in (".json", ".jsonl") and file.name != SAVED:
            yield from _json_records(file)
        else:
            name = file if file.suffix == ".parquet" else path
            yield from ((f"{name}, row {index}", row) for index, row in enumerate(_load_table(file, path), 1))
    except InputError as error:
        yield str(file), error
    except (ValueError, csv.Error) as error:  # what decoders raise for a file as a whole
        yield str(file), InputError(f"{file}: not {file.suffix[1:].upper()} in UTF-8 ({error})")


def _json_records(file: Path) -> Iterator[tuple[str, object]]:
    """One record per line, or one JSON array of records."""
    with file.open("rb") as lines:
        if file.suffix == ".json" and lines.peek().lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
            records = json.loads(lines.read().decode("utf-8-sig"))
            yield from ((f"{file}, record {number}", record) for number, record in enumerate(records, 1))
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                found = line[:80].decode(errors="replace").strip()[:60]
                record = InputError(f"{place}: not JSON in UTF-8 ({error}), found {found!r}")
            yield place, record


def _csv_records(file: Path) -> Iterator[tuple[str, object]]:
    """Rows of a CSV file with a header; margin and chosen_probability are numbers, empty cells are absent."""
    csv.field_size_limit(2**31 - 1)
    # surrogateescape: a byte that is not UTF-8 costs its own record (`_row` refuses it), not the rest of the file.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            record = {key: value for key, value in row.items() if key and value}
            try:
                record |= {key: float(record[key]) for key in ("margin", "chosen_probability") if key in record}
            except ValueError as error:
                record = InputError(f"{place}: margin and chosen_probability are numbers ({error})")
            yield place, record


def _load_table(file: Path, path: str) -> datasets.Dataset:
    """A Parquet file, a folder of `save_to_disk`, or the hub dataset `path`."""
    name, _, split = path.partition("@")
    what = f"no local path {path}, and the hub dataset cannot be loaded"
    try:
        if file.suffix == ".parquet":
            what = f"cannot read {file} as parquet"
            return datasets.load_dataset("parquet", data_files=str(file), split="train")
        if file.name == SAVED:
            what = f"cannot read {file.parent} as a saved dataset"
            return datasets.load_from_disk(str(file.parent))
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # network, permission and format errors have no common base
        raise InputError(f"{what}: {str(error).splitlines()[0]}") from error
