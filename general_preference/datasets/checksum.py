"""A checksum of all that steps learn from a table: a continued run needs the same. Called by trainer/trainer.py."""

import xxhash

LEARNED = ("prompt_ids", "response_ids", "first", "second", "label", "margin", "group", "anchor")
ROWS = 2000  # read at a time


def table_checksum(table) -> str:
    """128-bit XXH3 (hexadecimal) of the columns `LEARNED` of a `datasets.Dataset`, as far as it has them, in row order.

    The same however the table is stored: chunks, caches, selections and the width of its numbers do not count.
    """
    columns = [name for name in LEARNED if name in table.column_names]
    digests: dict[str, xxhash.xxh3_128] = {}
    for rows in table.select_columns(columns).with_format("arrow").iter(batch_size=ROWS):
        rows = rows.combine_chunks()  # a selection comes row by row
        for name in columns:
            for chunk in rows[name].chunks:
                _add(digests, name, chunk)
    total = xxhash.xxh3_128(f"{len(table)} rows\n".encode())
    for name, digest in digests.items():
        total.update(f"{name} {digest.hexdigest()}\n".encode())
    return total.hexdigest()


def _add(digests: dict[str, xxhash.xxh3_128], name: str, array) -> None:
    """Hash an Arrow array of numbers, or of lists of them: the lists' lengths and what is in them, each by itself."""
    if hasattr(array, "value_lengths"):
        _add(digests, f"{name}.length", array.value_lengths())
        _add(digests, f"{name}.item", array.flatten())
        return
    numbers = array.to_numpy(zero_copy_only=False)
    wide = numbers.astype("float64" if numbers.dtype.kind == "f" else "int64", copy=False)
    digests.setdefault(name, xxhash.xxh3_128()).update(wide)
