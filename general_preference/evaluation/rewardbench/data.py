"""The rows of RewardBench 1, RewardBench 2 and the prior sets, each checked before anything is scored.

From the hub, or from local files with the hub's columns: prompt, chosen, rejected, subset, id. In version 2 `chosen`
and `rejected` are lists of texts, in the prior sets `prompt` is a list of messages.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import datasets

from general_preference.datasets.readers import file_format
from general_preference.datasets.reading import Reading
from general_preference.datasets.sources import Source, is_record_location, load_source, parse_sources, record_location
from general_preference.errors import InputError
from general_preference.evaluation.rewardbench.scoring import PRIOR_ROWS, ROWS_1, ROWS_2, TIES

logger = logging.getLogger(__name__)

DEBUG_ROWS = 10
LEFT_OUT = ("pku_better", "pku_safer")  # on the hub beside the prior sets, no part of the benchmark


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: `ending` is that of its result files, `hub` and `splits` are where the hub has it.

    rows: official number of rows per subset, in order. best_of_n: a row has several rejected responses (version 2).
    """

    title: str
    ending: str
    hub: str
    splits: tuple[str, ...]
    rows: dict[str, int]
    best_of_n: bool = False

    @property
    def official_sources(self) -> list[Source]:
        """The hub's sets; where each split is a subset, called so."""
        return [Source(split, f"{self.hub}@{split}") for split in self.splits]


REWARDBENCH_1 = Benchmark("RewardBench", "", "allenai/reward-bench", ("filtered",), ROWS_1)
REWARDBENCH_2 = Benchmark("RewardBench 2", ".v2", "allenai/reward-bench-2", ("test",), ROWS_2, best_of_n=True)
PREF_SETS = Benchmark("prior sets", ".pref_sets", "allenai/pref-test-sets", tuple(PRIOR_ROWS), PRIOR_ROWS)


def load_benchmark(
    benchmark: Benchmark,
    dataset: str | None = None,
    debug=False,
    allow_empty=False,
    ignore_columns: tuple[str, ...] = (),
):
    """The rows of a benchmark in their own order, with the columns of `sources.ROW` but `problem`.

    Args:
        dataset: local files or hub names instead of the official ones, as `parse_sources` takes them. Of a folder with
            the hub repository's files, the official splits are read. A set named like a prior set (`shp=file.jsonl`)
            is that one; elsewhere the rows' `subset` counts.
        debug: the first ten rows only. allow_empty: score empty responses instead of refusing them.
        ignore_columns: columns with text that may be left out.

    Raises:
        InputError: a row that cannot be scored, with its file or set, its number and the reason.
    """
    sources = [part for source in parse_sources(dataset) for part in _parts(benchmark, source)] if dataset else None
    tables = []
    ties: dict[tuple[str, int], str] = {}
    for source in sources or benchmark.official_sources:
        if file_format(source.path) in (".csv", ".tsv") and benchmark is not REWARDBENCH_1:
            raise InputError(f"{source.path}: a CSV file has no lists as in {benchmark.title}: use JSONL or Parquet")
        try:
            table, _ = load_source(source, Reading(ignore_columns=ignore_columns), remedy="nothing was scored")
        except InputError as error:
            if sources is None and "cannot be loaded" in str(error):
                raise InputError(f"{error}; if there is a copy on disk, name it as the dataset") from error
            raise
        tables.append(_prior_set(source, table) if benchmark is PREF_SETS else table)
        for index, row in enumerate(tables[-1]):
            place = record_location(row["id"], index, source.path)
            problem = _problem(benchmark, row, allow_empty)
            if not problem and benchmark.best_of_n and row["subset"] == TIES:
                first = ties.setdefault(parse_ties_id(row["id"]), place)
                problem = f"the id is already used in {first}" if first != place else ""
            if problem:
                raise InputError(f"{place}: {problem}; nothing was scored")
    whole = datasets.concatenate_datasets(tables)
    return whole.select(range(min(DEBUG_ROWS, len(whole)))) if debug else whole


def _prior_set(source: Source, table: datasets.Dataset) -> datasets.Dataset:
    if source.name in PREF_SETS.rows:
        return table.remove_columns("subset").add_column("subset", [source.name] * len(table))
    kept = [index for index, subset in enumerate(table["subset"]) if subset not in LEFT_OUT]
    if len(kept) < len(table):
        logger.info("left out: %d rows of %s", len(table) - len(kept), ", ".join(LEFT_OUT))
    return table.select(kept)


def _parts(benchmark: Benchmark, source: Source) -> list[Source]:
    """The official splits in a folder of the hub repository's files; anything else is one source."""
    folder = Path(source.path).expanduser()
    files = ((split, file) for split in benchmark.splits for file in sorted(folder.rglob(f"{split}-[0-9]*.parquet")))
    return [Source(split, str(file)) for split, file in files] or [source]


def content_fingerprint(table: datasets.Dataset) -> str:
    """sha256 over the rows as JSON, in order; the same whatever file they came from."""
    digest = hashlib.sha256()
    for row in table.select_columns(["id", "subset", "prompt", "responses", "first", "second"]):
        known = "" if is_record_location(row["id"]) else row["id"]
        digest.update(json.dumps(row | {"id": known}, sort_keys=True).encode())
    return digest.hexdigest()


def right_responses(comparison: dict) -> int:
    """How many of a row's responses are right; they are the first ones. `comparison` has `first`."""
    return max(comparison["first"]) + 1


def parse_ties_id(text: str) -> tuple[str, int]:
    """`"tied:7"` -> ("tied", 7): the kind of a row of "Ties" and the number it shares with its partner."""
    found = re.fullmatch(r"(ref|tied):([0-9]{1,9})", text)
    if found is None:
        raise InputError(f"the id of a row of '{TIES}' is {text!r}, expected ref:N or tied:N")
    return found[1], int(found[2])


def _problem(benchmark: Benchmark, row: dict, allow_empty: bool) -> str:
    """Why this row cannot be scored; nothing if it can."""
    if not row["subset"]:
        return "it has no subset"
    if row["subset"] not in benchmark.rows:
        return f"unknown subset {row['subset']!r}; {benchmark.title} has {', '.join(benchmark.rows)}"
    right, count = right_responses(row), len(row["responses"])
    stated = list(zip(row["first"], row["second"], row["label"], strict=True))
    if stated != [(i, j, 1.0) for i in range(right) for j in range(right, count)]:
        return f"its preferences are {stated}, expected each chosen response over each rejected one"
    several = benchmark.best_of_n and row["subset"] == TIES
    if not several and (right > 1 or (count > 2) != benchmark.best_of_n):
        expected = "one and several" if benchmark.best_of_n else "one and one"
        return f"{right} chosen and {count - right} rejected responses, expected {expected}"
    for number, response in enumerate(row["responses"]):
        if not allow_empty and not "".join(message["content"] for message in response).strip():
            side = "chosen" if number < right else "rejected"
            return f"a {side} response is empty (allow_empty_responses scores such rows)"
    if several:
        try:
            parse_ties_id(row["id"])
        except InputError as error:
            return str(error)
    return ""
