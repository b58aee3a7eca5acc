"""The rows of RewardBench 1, RewardBench 2 and the prior sets, each checked before anything is scored.

From the hub, or from local files with the hub's columns: prompt, chosen, rejected, subset, id. In version 2 `chosen`
and `rejected` are lists of texts, in the prior sets `prompt` is a list of messages.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import datasets

from general_preference.datasets.sources import load_source, parse_sources
from general_preference.errors import InputError
from general_preference.rewardbench.scoring import PRIOR_SETS, SUBSETS_1, SUBSETS_2, TIES

DEBUG_ROWS = 10


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its title, the ending of its result files, where the hub has it, and its subsets in order."""

    title: str
    ending: str
    hub: str
    subsets: tuple[str, ...]

    @property
    def best_of_n(self) -> bool:
        """Whether a row has one right response or more among several, as in version 2."""
        return TIES in self.subsets


REWARDBENCH_1 = Benchmark("RewardBench", "", "allenai/reward-bench@filtered", SUBSETS_1)
REWARDBENCH_2 = Benchmark("RewardBench 2", ".v2", "allenai/reward-bench-2@test", SUBSETS_2)
PREF_SETS = Benchmark(
    "prior sets",
    ".pref_sets",
    ",".join(f"{name}=allenai/pref-test-sets@{name}" for name in PRIOR_SETS),
    PRIOR_SETS,
)


def load_benchmark(
    benchmark: Benchmark, dataset: str | None = None, debug: bool = False, allow_empty: bool = False
) -> datasets.Dataset:
    """The rows of a benchmark in their own order, with the columns of `sources.ROW` but `problem`.

    Args:
        dataset: local files or hub names instead of the official ones, as `parse_sources` takes them. A set named like
            a prior set (`shp=file.jsonl`) is that one; elsewhere the rows' `subset` counts.
        debug: the first ten rows only.
        allow_empty: score empty responses instead of refusing them.

    Raises:
        InputError: a row that cannot be scored, with its file or set, its number and the reason.
    """
    tables = []
    for source in parse_sources(dataset or benchmark.hub):
        try:
            table, _ = load_source(source, remedy="nothing was scored")
        except InputError as error:
            raise error if dataset else InputError(f"{error}; for a copy on disk: --dataset PATH") from error
        if benchmark is PREF_SETS and source.name in PRIOR_SETS:
            table = table.remove_columns("subset").add_column("subset", [source.name] * len(table))
        for index, problem in _problems(benchmark, table, allow_empty):
            raise InputError(f"{_place(source.path, table, index)}: {problem}; nothing was scored")
        tables.append(table)
    whole = datasets.concatenate_datasets(tables)
    if benchmark.best_of_n:
        _check_pairs(whole)
    return whole.select(range(min(DEBUG_ROWS, len(whole)))) if debug else whole


def content_fingerprint(table: datasets.Dataset) -> str:
    """A hash of what the rows say, the same wherever they came from: sha256 over them as JSON, in order."""
    digest = hashlib.sha256()
    for row in table.select_columns(["id", "subset", "prompt", "responses", "first", "second"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def right_responses(comparison: dict) -> int:
    """How many of a row's responses are right; they are the first ones. `comparison` has `first` and `second`."""
    return max(comparison["first"]) + 1


def parse_ties_id(text: str) -> tuple[str, int]:
    """`"tied:7"` -> ("tied", 7): the kind of a row of "Ties" and the number it shares with its partner."""
    found = re.fullmatch(r"(ref|tied):(\d+)", text)
    if found is None:
        raise InputError(f"the id of a row of '{TIES}' is {text!r}, expected ref:N or tied:N")
    return found[1], int(found[2])


def _problems(benchmark: Benchmark, table: datasets.Dataset, allow_empty: bool) -> Iterator[tuple[int, str]]:
    """(index, why this row cannot be scored); the first one found is enough."""
    for index, row in enumerate(table):
        stated = list(zip(row["first"], row["second"], row["label"], strict=True))
        right, count = right_responses(row), len(row["responses"])
        if not row["subset"]:
            yield index, "it has no subset"
        elif row["subset"] not in benchmark.subsets:
            known = ", ".join(benchmark.subsets)
            yield index, f"unknown subset '{row['subset']}'; {benchmark.title} has {known}"
        elif not benchmark.best_of_n and stated != [(0, 1, 1.0)]:
            yield index, f"{count} responses and preferences {stated}, expected one chosen and one rejected"
        elif benchmark.best_of_n and stated != [(i, j, 1.0) for i in range(right) for j in range(right, count)]:
            yield index, "its preferences are not each chosen response over each rejected one"
        else:
            for number, response in enumerate(row["responses"]):
                if not allow_empty and not "".join(message["content"] for message in response).strip():
                    side = "chosen" if number < right else "rejected"
                    yield index, f"a {side} response is empty (--allow_empty_responses scores it as it is)"
            if row["subset"] == TIES and benchmark.best_of_n:
                try:
                    parse_ties_id(row["id"])
                except InputError as error:
                    yield index, str(error)


def _check_pairs(table: datasets.Dataset) -> None:
    """No two rows of "Ties" may claim the same place in a pair."""
    seen: dict[tuple[str, int], int] = {}
    for index, (subset, name) in enumerate(zip(table["subset"], table["id"], strict=True)):
        if subset == TIES and (first := seen.setdefault(parse_ties_id(name), index)) != index:
            raise InputError(
                f"rows {first + 1} and {index + 1} of '{TIES}' have the same id {name}; nothing was scored"
            )


def _place(path: str, table: datasets.Dataset, index: int) -> str:
    """Which row: by its place in the file where it has no id of its own."""
    name = table[index]["id"]
    return name if name.startswith(path) else f"{path}, row {index + 1} (id {name})"
