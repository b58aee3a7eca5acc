"""A model over a table of comparisons: one result row each, and what the rows add up to.

What a user's file (eval/) and a benchmark (rewardbench_eval/) have in common.
"""

import fcntl
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.files import lock_folder, replace_lines, replace_text
from general_preference.inference.embedding import EmbeddedPrompt, embed
from general_preference.inference.pipeline import GPMPipeline
from general_preference.inference.ranking import hodge
from general_preference.models.losses import preference_loss
from general_preference.models.score import preference_probability
from general_preference.models.statistics import (
    calibration_bins,
    preference_statistics,
    preference_sums,
    wilson_interval,
)

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
ASKED = "asked"  # the part of the settings that is kept for people: it may change without changing a row
JUDGED = ("correct", "merit")  # columns that are found out from a row afterwards, see `replace_rows`
FILES = "files"  # the names of what the run writes beside the rows; only these may a later run replace


class ResultStore:
    """The rows of one run over `count` comparisons, by index.

    Args:
        rank: of this process, which writes a part of its own.
        flag: the script's flag that named `output`, for messages.
        beside: endings of the other files that the script writes beside the output, see `beside()`.
    """

    def __init__(self, output: Path, count: int, rank: int, flag: str = "--output_path", beside: tuple[str, ...] = ()):
        self.output, self.count, self.flag = output, count, flag
        self.parts = output.with_name(output.name + ".parts")
        self.summary = self.beside(".summary.json")
        self._written = (self.summary, *map(self.beside, beside))
        self._part = self.parts / f"part-{rank}.jsonl"
        self._file = self._claim = None

    def beside(self, suffix: str) -> Path:
        """The file that is called like the output (without .jsonl) and ends in `suffix`."""
        return self.output.with_name(self.output.name.removesuffix(".jsonl") + suffix)

    def touches(self, data: Path) -> bool:
        """Whether writing the results would replace `data`, or write into it."""
        data, parts = data.expanduser().resolve(), self.parts.resolve()
        written = [path.resolve() for path in (self.output, self.parts, *self._written)]
        return data in written or parts in data.parents or (data.is_dir() and data in written[0].parents)

    def claim(self, settings: dict, overwrite: bool) -> None:
        """Take the output for this run and get its parts ready. On the main process, before the others look.

        Args:
            settings: JSON-serialisable, what every row depends on, and under `ASKED` what was asked for.
            overwrite: drop what other settings left there.

        Raises:
            InputError: another run is writing, the results there were made with other settings or were changed since,
                or something there is not of a run.
        """
        self._refuse_strangers()
        self._claim = lock_folder(self.parts, self.flag)
        settings = json.loads(json.dumps(settings | {FILES: [path.name for path in self._written]}))
        found = self._settings()
        same = found is not None and _matters(found) == _matters(settings)
        whole = not self.output.exists() or self._is_whole()
        if found is None and self.output.exists():
            self._release_if_new()
            raise InputError(f"{self.output} is not of a run: choose another {self.flag}, or remove it")
        if not (same and whole) and not overwrite and found is not None:
            problem = (
                _difference(found, settings) if not same else f"it was changed since its {self.count} rows were made"
            )
            self._release_if_new()
            raise InputError(f"{self.flag} {self.output}: {problem}; choose another path, or pass --overwrite")
        if not (same and whole):
            earlier = [self.output.with_name(name) for name in (found or {}).get(FILES, [])]
            for stale in [self.output, *earlier, *self.parts.glob("part-*.jsonl")]:
                stale.unlink(missing_ok=True)
        replace_text(self.parts / SETTINGS, json.dumps(settings, indent=2))
        for part in self.parts.glob("part-*.jsonl"):
            _clean(part, self.count)

    def _refuse_strangers(self) -> None:
        """InputError where this run would write over, or remove, what no run of this kind has left."""
        if self.parts.is_dir():
            strangers = [path.name for path in self.parts.iterdir() if not _is_ours(path)]
            if strangers:
                raise InputError(
                    f"{self.parts} holds {strangers[0]!r}, which is not of a run: choose another {self.flag}"
                )
        known = (self._settings() or {}).get(FILES, [])
        for path in self._written:
            if path.is_dir() or (path.exists() and path.name not in known):
                raise InputError(
                    f"{path} is not of a run and would be replaced: choose another {self.flag}, or remove it"
                )
        if self.output.is_dir():
            raise InputError(f"{self.output} is a folder: choose another {self.flag}")

    def _is_whole(self) -> bool:
        """Whether the output still holds the rows that were computed, one for every comparison."""
        recorded = _read_json(self.summary).get("rows")
        with self.output.open("rb") as lines:
            rows = [_is_row(line) for line in lines]
        whole = len(rows) == self.count and all(rows)
        return whole and recorded in (None, self._fingerprint())

    def _fingerprint(self) -> str:
        """sha256 over the rows as they were computed."""
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(json.dumps({key: row[key] for key in row if key not in JUDGED}).encode())
        return digest.hexdigest()

    def finished(self) -> set[int]:
        """Indices whose rows are on disk. One process asks, once the output is claimed, and tells the others."""
        if self.output.exists():
            return set(range(self.count))
        return {index for part in self.parts.glob("part-*.jsonl") for index, _ in _rows(part, self.count)}

    def append(self, index: int, row: dict) -> None:
        """Put one finished row on disk."""
        if self._file is None:
            self._file = self._part.open("a", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.write(f"{index}\t{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing more comes from this process; the output is free for another run."""
        for held in (self._file, self._claim):
            if held is not None:
                held.close()

    def merge(self) -> None:
        """Parts -> the output, in order. On the main process, when no process has more to append."""
        if self.output.exists():
            return
        lines: list[str | None] = [None] * self.count
        for part in sorted(self.parts.glob("part-*.jsonl")):
            for index, row in _rows(part, self.count):
                lines[index] = row.decode().rstrip("\n")
        missing = lines.count(None)
        if missing:
            raise RuntimeError(f"{missing} of {self.count} rows are missing under {self.parts}: run this again")
        replace_lines(self.output, lines)

    def rows(self) -> Iterator[dict]:
        """The rows of the merged output, in order."""
        with self.output.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def replace_rows(self, rows: list[dict]) -> None:
        """Write the merged rows anew, with the columns `JUDGED` that were found out since. On the main process."""
        replace_lines(self.output, [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows])

    def finish(self, summary: dict) -> None:
        """Write the summary beside the output and drop the parts. On the main process."""
        settings = _read_json(self.parts / SETTINGS)
        whole = {"settings": settings} | summary | {"rows": self._fingerprint()}
        replace_text(self.summary, json.dumps(whole, indent=2))
        self._remove_parts()

    def _settings(self) -> dict | None:
        """What the rows that are there were made with; None if nothing is there or nothing says so."""
        found = _read_json(self.parts / SETTINGS) or _read_json(self.summary).get("settings")
        valid = isinstance(found, dict) and found and isinstance(found.get(ASKED, {}), dict)
        return found if valid else None

    def _release_if_new(self) -> None:
        """Leave no empty parts folder beside the results of an earlier run."""
        self._claim.close()
        if not (self.parts / SETTINGS).exists():
            self._remove_parts()

    def _remove_parts(self) -> None:
        for path in self.parts.iterdir():
            if _is_ours(path):
                path.unlink()
        self.parts.rmdir()


def _is_ours(path: Path) -> bool:
    return path.is_file() and bool(
        re.fullmatch(r"\.lock|\.?settings\.json(\.tmp)?|\.?part-\d+\.jsonl(\.tmp)?", path.name)
    )


def _read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _matters(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in (ASKED, FILES)}


def _difference(found: dict, settings: dict) -> str:
    before, now = (_matters(some) | some.get(ASKED, {}) for some in (found, settings))
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    values = [f"{name} = {before.get(name)!r}, now {now.get(name)!r}" for name in names]
    return f"the results there were made with {'; '.join(values)}"


def _rows(part: Path, count: int) -> Iterator[tuple[int, bytes]]:
    """(index, row as JSON text) of every whole line; what a killed process or a failing disk left is passed over."""
    with part.open("rb") as lines:
        for line in lines:
            index, _, row = line.partition(b"\t")
            known = len(index) < 10 and index.isdigit() and int(index) < count
            if known and line.endswith(b"\n") and _is_row(row):
                yield int(index), row


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "id" in row and all(_are_numbers(row.get(key)) for key in ("score", "probability"))


def _are_numbers(value: object) -> bool:
    """A finite number, or a list of these."""
    if isinstance(value, list):
        return all(map(_are_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _clean(part: Path, count: int) -> None:
    """Leave only whole rows in a part, so that more can be appended; a process that still writes there is noticed."""
    with part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{part} is still being written by another run: wait for it, or end it") from None
        rows = [f"{index}\t{row.decode()}".rstrip("\n") for index, row in _rows(part, count)]
        dropped = sum(1 for _ in file) - len(rows)
        if dropped:
            logger.warning("%s: %d damaged lines are made anew", part.name, dropped)
            replace_lines(part, rows)


WINDOW = 512  # comparisons in memory at a time
ALL = "all"


MakeRow = Callable[[dict, EmbeddedPrompt], dict]  # (tokenized comparison, its embeddings) -> result row


def score_remaining(
    rm: GPMPipeline,
    table: datasets.Dataset,
    store: ResultStore,
    processes: DistributedContext,
    make_row: MakeRow,
    batch_size: int | None = None,
) -> None:
    """Score what has no row in `store` yet, shared among the processes; then the main one writes the whole output.

    Returns on every process when all are done.
    """
    finished = processes.broadcast(store.finished() if processes.is_main else None)
    lengths = table["length"][:]
    remaining = [index for index in range(len(table)) if index not in finished]
    remaining.sort(key=lambda index: (-lengths[index], index))
    logger.info(
        "%d comparisons%s; %s D=%d on %s, %d process(es)",
        len(table), f", {len(finished)} done before" if finished else "",
        rm.preference.head, rm.value_head_dim, rm.device, processes.world_size,
    )  # fmt: skip
    mine = remaining[processes.rank :: processes.world_size]
    score_table(rm, table, mine, store, make_row, batch_size=batch_size, progress=processes.is_main)
    processes.barrier()
    if processes.is_main:
        store.merge()


def score_table(
    rm: GPMPipeline,
    table: datasets.Dataset,
    indices: list[int],
    store: ResultStore,
    make_row: MakeRow,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> None:
    """Score the comparisons `indices` of a tokenized table and put each row on disk as soon as it is done.

    Comes out `WINDOW` at a time, in the order given; `batch_size` bounds the comparisons of a call.
    """
    with tqdm(total=len(indices), desc="scoring", unit="cmp", disable=not (progress and indices), mininterval=1) as bar:
        for start in range(0, len(indices), WINDOW):
            window = indices[start : start + WINDOW]
            rows = [table[index] for index in window]
            found = embed(rm.model, rows, batch_tokens=rm.batch_tokens, batch_size=batch_size, padding=rm.padding)
            for position, embedded in found:
                store.append(window[position], make_row(rows[position], embedded))
                bar.update()


def result_row(comparison: dict, embedded: EmbeddedPrompt, tau: float, save_embeddings: bool = False) -> dict:
    """What is written about one comparison.

    A pair gives `score` and `probability` of response 0 (chosen) over response 1 (rejected), and `label`, the stated
    probability of that. A comparison with more responses or preferences gives lists, one entry per stated preference,
    each [preferred, other, label] in `preferences`; with K >= 3 responses also `cyclic_share` of their scores.
    """
    scores = embedded.scores()
    row = {"id": comparison["id"]} | ({"subset": comparison["subset"]} if comparison["subset"] else {})
    stated = list(zip(comparison["first"], comparison["second"], comparison["label"], strict=True))
    if len(scores) == 2 and len(stated) == 1:
        first, _, label = stated[0]
        score = scores[0, 1]
        row |= {"score": score.item(), "probability": preference_probability(score, tau).item()}
        row["label"] = label if first == 0 else 1 - label
    else:
        chosen = torch.stack([scores[first, second] for first, second, _ in stated])
        row |= {"score": chosen.tolist(), "probability": preference_probability(chosen, tau).tolist()}
        row["preferences"] = [list(preference) for preference in stated]
        if len(scores) > 2:
            row["cyclic_share"] = hodge(scores).cyclic_share
    if save_embeddings:
        row["embeddings"] = embedded.embeddings.tolist()
        row |= {"gate": embedded.gate.tolist()} if embedded.gate is not None else {}
    return row


class ResultSummary:
    """Statistics of result rows: over all of them and over each subset."""

    def __init__(self, tau: float):
        self.tau = tau
        self.scores: dict[str, list[float]] = {}
        self.labels: dict[str, list[float]] = {}
        self.cyclic: dict[str, list[float]] = {}

    def add(self, rows: Iterable[dict]) -> "ResultSummary":
        """Take in rows that `result_row` made."""
        for row in rows:
            subset, pair = row.get("subset", ""), "preferences" not in row
            labels = [row["label"]] if pair else [label for *_, label in row["preferences"]]
            self.scores.setdefault(subset, []).extend([row["score"]] if pair else row["score"])
            self.labels.setdefault(subset, []).extend(labels)
            if "cyclic_share" in row:
                self.cyclic.setdefault(subset, []).append(row["cyclic_share"])
        return self

    def results(self) -> dict[str, dict]:
        """{subset: statistics}, "all" last: those of `statistics.preference_statistics`, and

        accuracy_low, accuracy_high: 95 % interval of the accuracy, as if preferences were independent
        groups, cyclic_share:        comparisons with three responses or more, and the mean share of their squared
                                     scores that no ranking can explain
        """
        results = {}
        for name in [*sorted(self.scores.keys() - {""}), ALL]:
            row = preference_statistics(self._sums(name))
            row["accuracy_low"], row["accuracy_high"] = wilson_interval(row["accuracy"], row["n"])
            cyclic = self._of(self.cyclic, name)
            row |= {"groups": len(cyclic), "cyclic_share": math.fsum(cyclic) / len(cyclic)} if cyclic else {}
            results[name] = row
        return results

    def reliability(self) -> list[tuple[float, float, int]]:
        """Bins of the reliability diagram over all rows, see `statistics.calibration_bins`."""
        return calibration_bins(self._sums(ALL))

    def _sums(self, name: str) -> torch.Tensor:
        score, label = (torch.tensor(self._of(kept, name), dtype=torch.float64) for kept in (self.scores, self.labels))
        return preference_sums(score, label, preference_loss(score, temperature=self.tau, label=label), self.tau)

    def _of(self, kept: dict[str, list[float]], name: str) -> list[float]:
        return [value for values in kept.values() for value in values] if name == ALL else kept.get(name, [])


logger = logging.getLogger(__name__)
