"""Decodes files of records one by one: JSON, CSV, TSV, Parquet and Arrow, as they are or compressed (.gz, .zst).

A record that cannot be decoded costs itself alone where the next one is sure to begin; anything else refuses the file.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow
from pyarrow import ipc, parquet

from general_preference.errors import InputError

COMPRESSED = (".gz", ".zst")
BATCH = 1000  # rows decoded at a time

Records = Iterator[tuple[str, object]]


def file_format(name: str | Path) -> str:
    """`x/Part-1.JSONL.gz` -> ".jsonl", a key of `READERS`; "" if the name is not that of a data file."""
    path = Path(str(name).lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in READERS else ""


def show(path: str | Path) -> str:
    r"""A path as text that Arrow, JSON and a terminal can hold: a byte that is not UTF-8 becomes \udcXX."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return show(" ".join(str(error).split()))[:300] or type(error).__name__


def read_records(file: Path) -> Records:
    """Yield (place, decoded record, or the InputError that says why there is none) for each record of a file.

    Raises:
        InputError: the file as a whole cannot be read: damaged, cut short, not what its name says.
    """
    title, reader = READERS[file_format(file)]
    try:
        with _open(file) as stream:
            yield from reader(stream, show(file))
    except InputError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read {show(file)} as {title}: {one_line(error)}") from error


def read_table(table: datasets.Dataset, name: str) -> Records:
    """Yield (place, record) for each row of a loaded dataset, all columns, whatever format was set on it."""
    batches = table.with_format(None).iter(BATCH)
    rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _open(file: Path) -> BinaryIO:
    suffix = file.suffix.lower()
    if suffix in COMPRESSED and file.stat().st_size == 0:  # both decoders take this for a file without records
        raise InputError(f"{show(file)} has 0 bytes, which is no {suffix[1:]} file: was it written to its end?")
    if suffix == ".gz":
        return gzip.open(file)
    stream = file.open("rb")
    return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd")) if suffix == ".zst" else stream


def _read_json_lines(stream: BinaryIO, name: str) -> Records:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            found = line[:80].decode(errors="replace").strip()[:60]
            record = InputError(f"{place}: not JSON in UTF-8 ({error}), found {found!r}")
        yield place, record


def _read_json(stream: BinaryIO, name: str) -> Records:
    """One JSON array of records, or one record per line."""
    if not stream.peek(1).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
        yield from _read_json_lines(stream, name)
        return
    for number, record in enumerate(json.loads(stream.read().decode("utf-8-sig")), 1):
        yield f"{name}, record {number}", record


def _read_csv(stream: BinaryIO, name: str, delimiter: str = ",") -> Records:
    """Rows under a header; margin and chosen_probability are numbers, empty cells are absent."""
    csv.field_size_limit(2**31 - 1)
    # surrogateescape: a byte that is not UTF-8 costs its own record (the caller refuses it), not the rest of the file.
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        first = reader.line_num + 1
        place = f"{name}, line {first}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problem = InputError(f"{place}: {error}; a cell in quotes ends with its quote, quotes inside are doubled")
            # A quote that stays open swallows the rows behind it: how many are lost is not known.
            if not header or reader.line_num > first or "end of data" in str(error):
                raise problem from error
            yield place, problem
            continue
        if cells is None:
            return
        if not header:
            header = cells
            "".join(header).encode()  # UnicodeEncodeError: not UTF-8
            _check_columns(header, place)
        elif cells:
            yield place, _csv_record(header, cells, place, delimiter)


def _csv_record(header: list[str], cells: list[str], place: str, delimiter: str) -> dict | InputError:
    if len(cells) != len(header):
        counts = f"{len(cells)} cells under {len(header)} columns"
        return InputError(f"{place}: {counts}; a cell that holds {delimiter!r} or a line break must stand in quotes")
    record: dict = {key: value for key, value in zip(header, cells, strict=True) if value}
    try:
        return record | {key: float(record[key]) for key in ("margin", "chosen_probability") if key in record}
    except ValueError as error:
        return InputError(f"{place}: margin and chosen_probability are numbers ({error})")


def _check_columns(names: list[str], place: str) -> None:
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise InputError(f"{place}: column {number} of {len(names)} has no name: name it, or remove the column")
        if name in names[: number - 1]:
            raise InputError(f"{place}: two columns are called {name!r}: rename or remove one")


def _read_parquet(stream: BinaryIO, name: str) -> Records:
    file = parquet.ParquetFile(_seekable(stream))
    return _read_batches(file.schema_arrow, file.iter_batches(BATCH), name)


def _read_arrow(stream: BinaryIO, name: str) -> Records:
    """Both of Arrow's formats: the stream, which `datasets` writes, and the file."""
    stream = _seekable(stream)
    try:
        file = ipc.open_file(stream)
        return _read_batches(file.schema, map(file.get_batch, range(file.num_record_batches)), name)
    except pyarrow.ArrowInvalid:
        stream.seek(0)
    reader = ipc.open_stream(stream)
    return _read_batches(reader.schema, reader, name)


def _seekable(stream: BinaryIO) -> BinaryIO:
    plain = isinstance(getattr(stream, "raw", None), io.FileIO)
    return stream if plain else pyarrow.BufferReader(stream.read())


def _read_batches(schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch], name: str) -> Records:
    _check_columns(schema.names, name)
    # What `datasets` wrote may hold columns that only it decodes, such as JSON.
    decode = b"huggingface" in (schema.metadata or {}) and datasets.Features.from_arrow_schema(schema).decode_example
    rows = (row for batch in batches for part in _parts(batch) for row in part.to_pylist())
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", decode(row) if decode else row


def _parts(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    return (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))


READERS = {
    ".jsonl": ("JSON in UTF-8", _read_json_lines),
    ".ndjson": ("JSON in UTF-8", _read_json_lines),
    ".json": ("JSON in UTF-8", _read_json),
    ".csv": ("CSV in UTF-8", _read_csv),
    ".tsv": ("TSV in UTF-8", partial(_read_csv, delimiter="\t")),
    ".parquet": ("Parquet", _read_parquet),
    ".arrow": ("Arrow", _read_arrow),
}
