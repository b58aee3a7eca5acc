"""Result files read back: what a model decided on each comparison. Called by eval/compare_models.py.

Such a file is of batch inference (`batch.result_row`) or of evaluation/rewardbench/, whose rows have `correct`.
"""

import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from general_preference.datasets.sources import is_record_location
from general_preference.errors import InputError
from general_preference.files import read_object
from general_preference.inference.batch import ASKED, ResultStore
from general_preference.models.statistics import preference_credit

COMPARISONS, PAIRS, BEST_OF_N = "results of batch inference", "pairs of RewardBench", "rows of RewardBench 2"
CREDIT = {
    COMPARISONS: "a tie counts one half",
    PAIRS: "a tie is a loss",
    BEST_OF_N: "responses that tie at the top share the credit; in 'Ties', all right responses must be on top",
}


@dataclass(frozen=True)
class Decision:
    """A model on one comparison of row number `row` (from 0), with the credit it gets in [0, 1], see `CREDIT`.

    score, probability: of the preferred response; in RewardBench 2 the lowest of the right responses
    preferred: equal for models that prefer the same. between: a group's two responses, the preferred one first.
    cluster: equal for rows that are resampled together: the two of a number in the subset "Ties" of RewardBench 2.
    """

    row: int
    cluster: int | str
    credit: float
    score: float
    probability: float
    preferred: object
    tie: bool
    between: tuple[int, int] | None = None


@dataclass(frozen=True)
class ModelResults:
    """A result file of N rows. A group has several decisions, any other row one.

    rows: N dicts of what the files of all models must have in common: id, subset and what is stated
    """

    path: Path
    kind: str
    summary: dict
    rows: list[dict]
    decisions: list[Decision]

    @property
    def settings(self) -> dict:
        """What the run was made with, from the summary beside the file; empty if there is none."""
        found = self.summary.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def model(self) -> str:
        """The last part of the model's path or hub name, from the summary; the file's name if there is none."""
        asked = self.settings.get(ASKED)
        path = isinstance(asked, dict) and (asked.get("model") or asked.get("pretrain"))
        return os.path.basename(str(path or "").rstrip("/")) or self.path.stem


def read_results(path: str) -> ModelResults:
    """A finished result file.

    Raises:
        InputError: no result file, or of a run that was stopped.
    """
    store = ResultStore(Path(path))
    if (store.parts / "settings.json").exists():
        raise InputError(f"{path} is of a run that was stopped or still runs: finish it with the same command")
    try:
        lines = store.output.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a file of results") from error
    rows, decisions, before = [], [], ""
    for index, line in enumerate(lines):
        try:
            kind, stated, found = _read_row(index, json.loads(line, parse_constant=_refuse))
            if rows and kind != before:
                raise ValueError(f"it belongs to {kind}, those before to {before}")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            remedy = "a .jsonl of batch inference or of RewardBench is needed"
            raise InputError(f"{path}, line {index + 1} is no row of results ({problem}): {remedy}") from error
        before = kind
        rows.append(stated)
        decisions += found
    if not rows:
        raise InputError(f"{path} is empty: it holds no results")
    return ModelResults(store.output, before, read_object(store.summary), rows, decisions)


def _refuse(constant: str):
    raise ValueError(f"it holds {constant}")


def _check_numbers(name: str, numbers: list, low: float = -sys.float_info.max, high=sys.float_info.max) -> None:
    for number in numbers:
        if type(number) not in (int, float) or not low <= number <= high:
            raise ValueError(f"its {name} is {str(number)[:40]!r}")


def _read_row(index: int, row: dict) -> tuple[str, dict, list[Decision]]:
    """(kind of the file, what is stated, what was decided) of a line."""
    name = os.path.basename(row["id"]) if is_record_location(row["id"]) else row["id"]  # data may have been moved
    stated = {"id": name, "subset": row.get("subset", "")}
    _check_numbers("correct", [row.get("correct", 0)], 0, 1)
    if not isinstance(stated["subset"], str):
        raise ValueError(f"its subset is {stated['subset']!r}")
    if "scores" in row:
        stated |= {"right": row["right"], "responses": len(row["merit"])}
        return BEST_OF_N, stated, [_best_of_n(index, row)]
    pair = "preferences" not in row
    preferences = [(0, 1, row["label"])] if pair else row["preferences"]
    scores, probabilities = ([row[name]] if pair else row[name] for name in ("score", "probability"))
    labels = [label for *_, label in preferences]
    if not len(preferences) == len(scores) == len(probabilities) > 0:
        raise ValueError(f"it has {len(preferences)} preferences, {len(scores)} scores")
    _check_numbers("score", scores)
    _check_numbers("probability", probabilities, 0, 1)
    _check_numbers("label", labels, 0, 1)
    credits = preference_credit(*(torch.tensor(numbers, dtype=torch.float64) for numbers in (scores, labels))).tolist()
    decisions = []
    for (i, j, label), score, chance, credit in zip(preferences, scores, probabilities, credits, strict=True):
        preferred = (score > 0) - (score < 0)
        if label < 0.5:  # it is the second that is preferred
            i, j, score, chance = j, i, -score, 1 - chance
        decided = (row.get("correct", credit), score, chance, preferred, preferred == 0)
        decisions.append(Decision(index, index, *decided, None if pair else (i, j)))
    stated |= {"label": row["label"]} if pair else {"preferences": preferences}
    return PAIRS if "correct" in row else COMPARISONS, stated, decisions


def _best_of_n(index: int, row: dict) -> Decision:
    right, merit, correct = row["right"], row["merit"], row["correct"]
    _check_numbers("score", row["score"])
    _check_numbers("merit", merit)
    _check_numbers("probability", row["probability"], 0, 1)
    lowest = min(row["score"][:right]), min(row["probability"][:right])
    if partner := re.fullmatch(r"(?:ref|tied):(\d+)", row["id"]):
        return Decision(index, partner[1], correct, *lowest, correct == 1, False)
    top = tuple(i for i, value in enumerate(merit) if value == max(merit))
    return Decision(index, index, correct, *lowest, top, len(top) > 1)


def check_same_rows(first: ModelResults, other: ModelResults) -> None:
    """InputError unless both files are about the same rows, naming what differs first."""
    if first.kind != other.kind:
        raise InputError(f"{other.path} holds {other.kind}, {first.path} {first.kind}: compare files of one kind")
    remedy = "only results of the same rows can be compared"
    for number, (row, found) in enumerate(itertools.zip_longest(first.rows, other.rows), 1):
        if row is None or found is None:
            longer, shorter = (first, other) if found is None else (other, first)
            counts = f"{longer.path} has {len(longer.rows)} rows, {shorter.path} ends before row {number}"
            raise InputError(f"{counts}: {remedy}")
        if row != found:
            name = next(name for name in (*row, *found) if row.get(name) != found.get(name))
            values = f"{found.get(name)!r} in {other.path}, {row.get(name)!r} in {first.path}"
            raise InputError(f"row {number} has {name} {values}: {remedy}")
    data = [file.settings.get("data") for file in (first, other)]  # of rows alone; batch inference's depends on tokens
    if None not in data and data[0] != data[1]:
        prints = f"data {data[1]} in {other.path}, {data[0]} in {first.path}"
        raise InputError(f"the same rows have other texts ({prints}): {remedy}")


def model_labels(files: list[ModelResults]) -> list[str]:
    """The models' names; if they are not unique the files' names, else their paths."""
    names = [[file.model for file in files], [file.path.stem for file in files], [str(file.path) for file in files]]
    return next(labels for labels in names if len(set(labels)) == len(labels))
