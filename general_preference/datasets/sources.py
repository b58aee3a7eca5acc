"""Where comparisons come from: files, folders and hub names, read once into a cached Arrow table, line by line.

A row of that table is a `Comparison` (or, in its `problem` column, why a record is none). The cache key holds the
path, size and modification time of a file, so an edited file is read again.
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

READER_VERSION = 4  # part of the cache key: raise it when the meaning of a row changes
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_MESSAGE = {"role": datasets.Value("string"), "content": datasets.Value("string")}
ROW = datasets.Features(
    {
        "id": datasets.Value("string"),
        "subset": datasets.Value("string"),
        "prompt": datasets.List(_MESSAGE),
        "responses": datasets.List(datasets.List(_MESSAGE)),
        "first": datasets.List(datasets.Value("int32")),
        "second": datasets.List(datasets.Value("int32")),
        "label": datasets.List(datasets.Value("float64")),
        "margin": datasets.Value("float64"),
        "problem": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Source:
    """One named set of comparisons: a file, a folder, or a hub dataset (`owner/name` or `owner/name@split`)."""

    name: str
    path: str


def parse_sources(text: str) -> list[Source]:
    """`path,path` or `name=path,name=path` -> sources.

    Unnamed ones are called after their file or folder, with the folder above it where that leaves two alike.

    Raises:
        InputError: an empty entry, or two sets with one name.
    """
    sources = []
    for entry in text.split(","):
        entry = entry.strip()
        name, separator, path = entry.partition("=")
        if not separator or "/" in name or Path(entry).exists():  # a path may hold "=" itself
            path, name = entry, Path(entry).stem if Path(entry).suffix in SUFFIXES else Path(entry).name
        if not path or not name:
            raise InputError(f"'{text}' holds an empty entry: expected path,path or name=path,name=path")
        sources.append(Source(name, path))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        sources = [
            Source(f"{Path(source.path).parent.name}/{source.name}", source.path) if "=" not in entry else source
            for source, entry in zip(sources, text.split(","), strict=True)
        ]
        names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two sets are called '{name}': give each its own name, as in first={sources[0].path}")
    return sources


def record_location(name: str, index: int, path: str = "") -> str:
    """How a message names a row: its place in the file where it has no id of its own, else its number and id."""
    shown = name if name.isprintable() else repr(name)
    return name if is_record_location(name) else f"{path}{', ' if path else ''}row {index + 1} (id {shown})"


def is_record_location(name: str) -> bool:
    """Whether an id is the place that was given to a record without one."""
    return bool(re.search(r", (line|record|row) \d+$", name))


def load_source(
    source: Source,
    custom: bool = False,
    skip_bad: bool = False,
    remedy: str = "mend it, or pass --on_bad_record skip",
) -> tuple[datasets.Dataset, int]:
    """All comparisons of a source as an Arrow table on disk (columns of `ROW` without `problem`).

    Args:
        custom: require the custom format of `--is_custom_dataset`.
        skip_bad: leave out records that do not fit instead of refusing the source.
        remedy: what the message about a bad record advises.

    Returns:
        the table and the number of records left out.

    Raises:
        InputError: no such file, nothing in it, or a record that does not fit, with file and line.
    """
    files = _files(source.path)
    # A hub dataset has no files here: its name and the fingerprint of what is loaded stand for them.
    # Two files may share a relative name, a size and a time: the whole path is part of the key.
    signature = [(str(file), str(file.resolve()), *_stat(file)) for file in files] or [
        (source.path, _from_hub(source.path)._fingerprint)
    ]
    arguments = {"path": source.path, "signature": signature, "custom": custom, "version": READER_VERSION}
    if next(_rows(**arguments), None) is None:
        raise InputError(f"{source.path} holds no records: check that it is the right file")
    table = datasets.Dataset.from_generator(_rows, features=ROW, gen_kwargs=arguments, split=datasets.Split.TRAIN)
    bad = [index for index, problem in enumerate(table["problem"][:]) if problem]
    if bad and not skip_bad:
        more = f" ({len(bad)} such records in all)" if len(bad) > 1 else ""
        raise InputError(f"{table[bad[0]]['problem']}{more}; {remedy}")
    if bad:
        for index in bad[:5]:
            logger.warning("left out: %s", table[index]["problem"])
        left_out = set(bad)
        table = table.select([index for index in range(len(table)) if index not in left_out])
    if len(table) == 0:
        raise InputError(f"{source.path} holds no usable record: all {len(bad)} were left out")
    return table.remove_columns("problem"), len(bad)


def _files(path: str) -> list[Path]:
    """The files behind a path; none for a hub name."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise InputError(
                f"{path} ends in '{place.suffix}': expected one of {', '.join(SUFFIXES)}, a folder or a hub name"
            )
        return [place]
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and not file.name.startswith("."))
        if (place / "dataset_info.json").is_file():
            found = sorted(place.glob("*.arrow"))
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
    """Yield one `ROW` per record. `signature` and `version` only make the cache key change with the input."""
    for place, record, problem in _records(path, signature):
        yield _row(place, record, problem, custom)


def _row(place: str, record: object, problem: str, custom: bool) -> dict:
    if not problem:
        try:
            found = parse_record(record, custom)
            json.dumps(record, ensure_ascii=False, default=str).encode()  # half a surrogate pair is no text
        except (ValueError, OverflowError) as error:
            problem = f"{place}: {error}"
    if problem:
        nothing = {name: [] for name in ("prompt", "responses", "first", "second", "label")}
        return nothing | {"id": place, "subset": "", "margin": 0.0, "problem": problem}
    first, second, label = (list(column) for column in zip(*found.preferences, strict=True))
    return {
        "id": found.id or place,
        "subset": found.subset,
        "prompt": found.prompt,
        "responses": found.responses,
        "first": first,
        "second": second,
        "label": label,
        "margin": found.margin,
        "problem": "",
    }


def _records(path: str, signature: list) -> Iterator[tuple[str, object, str]]:
    """Yield (place, decoded record, problem) from every file of a source, or from the hub."""
    for name, *_ in signature:
        file = Path(name)
        try:
            yield from _file_records(file, path)
        except InputError as error:  # a damaged file
            yield name, None, str(error)


def _file_records(file: Path, path: str) -> Iterator[tuple[str, object, str]]:
    """The records of one file of a source, or of the hub dataset `path` (whose "file" is its name)."""
    if not file.exists():
        yield from _table_records(_from_hub(path), path)
    elif file.suffix == ".arrow":
        yield from _table_records(datasets.Dataset.from_file(str(file)), path)
    elif file.suffix == ".parquet":
        yield from _table_records(_read_table("parquet", str(file)), str(file))
    elif file.suffix == ".csv":
        yield from _csv_records(file)
    else:
        yield from _json_records(file)


def _json_records(file: Path) -> Iterator[tuple[str, object, str]]:
    """One record per line, or one JSON array of records."""
    try:
        # A byte that is no UTF-8 becomes half a surrogate pair, so that it costs its own record and no other.
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            if file.suffix == ".json" and lines.read(4096).lstrip()[:1] == "[":
                lines.seek(0)
                yield from ((f"{file}, record {i}", record, "") for i, record in enumerate(json.load(lines), 1))
                return
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                place = f"{file}, line {number}"
                if not line.strip():
                    continue
                try:
                    line.encode()
                    yield place, json.loads(line), ""
                except UnicodeEncodeError as error:
                    yield place, None, f"{place}: not UTF-8 text (character {error.start + 1})"
                except (ValueError, RecursionError) as error:
                    yield place, None, f"{place}: not JSON ({error}), found {line.strip()[:60]!r}"
    except UnicodeDecodeError as error:
        yield str(file), None, f"{file}: not UTF-8 text ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        yield str(file), None, f"{file}, line {error.lineno}: not JSON ({error.msg})"


def _csv_records(file: Path) -> Iterator[tuple[str, object, str]]:
    """Rows of a CSV file with a header; margin and chosen_probability are numbers, empty cells are absent."""
    csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                place = f"{file}, line {reader.line_num}"
                record = {key: value for key, value in row.items() if key and value}
                try:
                    record |= {key: float(record[key]) for key in ("margin", "chosen_probability") if key in record}
                    yield place, record, ""
                except ValueError as error:
                    yield place, None, f"{place}: margin and chosen_probability are numbers ({error})"
    except (UnicodeDecodeError, csv.Error) as error:
        yield str(file), None, f"{file}: not a CSV file in UTF-8 ({error})"


def _table_records(table: datasets.Dataset, name: str) -> Iterator[tuple[str, object, str]]:
    return ((f"{name}, row {index}", row, "") for index, row in enumerate(table, 1))


def _read_table(kind: str, file: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(kind, data_files=file, split="train")
    except Exception as error:  # datasets and pyarrow raise many kinds for a damaged file
        raise InputError(f"cannot read {file} as {kind}: {str(error).splitlines()[0]}") from error


def _from_hub(path: str) -> datasets.Dataset:
    name, _, split = path.partition("@")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # network, permission and format errors have no common base
        raise InputError(
            f"no local path {path}, and the hub dataset cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
