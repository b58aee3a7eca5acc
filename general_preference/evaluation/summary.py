"""From the scores of a set to its numbers: subsets, averages, 95 % intervals, and what else the scores say."""

import json
import math
from collections.abc import Iterable

import numpy as np

from general_preference.evaluation.diagnostics import diagnose
from general_preference.evaluation.records import Record
from general_preference.evaluation.rewardbench.data import parse_ties_id
from general_preference.evaluation.rewardbench.scoring import TiesPrompt, ties_draws, ties_score
from general_preference.evaluation.rules import ACCURACY, TIED, grade_record, score_matrix
from general_preference.evaluation.sets import LoadedSet
from general_preference.inference.ranking import response_scores

DRAWS, SEED = 1000, 0
INTERVAL = (0.025, 0.975)  # 95 %


class Subset:
    """The records of one subset: sums of credits and weights, by prompt, which is what is resampled."""

    def __init__(self):
        self.records = 0
        self._sums: dict[str, dict[str, np.ndarray]] = {}  # {prompt: {number: (credit, weight)}}
        self._ties: list[TiesPrompt] = []

    def add(self, record: Record, scores: np.ndarray) -> None:
        """Count a record with its (K, K) scores."""
        self.records += 1
        sums = self._sums.setdefault(json.dumps(record.prompt), {})
        for number, found in grade_record(record, scores).items():
            sums[number] = sums.get(number, np.zeros(2)) + found
        if record.rule == TIED:
            right = max(winner for winner, _ in record.pairs) + 1
            self._ties.append(TiesPrompt.grade(*parse_ties_id(record.id), response_scores(scores), right))

    @property
    def numbers(self) -> list[str]:
        """Names of what its rule gives."""
        return list(next(iter(self._sums.values())))

    def sums(self, number: str) -> np.ndarray:
        """(prompts, 2) credits and weights."""
        return np.stack([sums[number] for sums in self._sums.values()])

    def mean(self, number: str) -> float:
        """Sum of credits over sum of weights; the accuracy of "Ties" is its official score."""
        if self._ties and number == ACCURACY:
            return ties_score(self._ties).score
        credits, weights = self.sums(number).T
        return math.fsum(credits) / math.fsum(weights)

    def draws(self, number: str, generator: np.random.Generator) -> np.ndarray | None:
        """(DRAWS,) means of prompts drawn with replacement, of "Ties" pairs of prompts; None of a single prompt."""
        if len(self._sums) < 2:
            return None
        if self._ties and number == ACCURACY:
            return np.asarray(ties_draws(sorted(self._ties, key=lambda prompt: prompt.number), DRAWS, SEED))
        # Prompts with the same sums are exchangeable: how often each kind is drawn is multinomial, exactly.
        kinds, counts = np.unique(self.sums(number), axis=0, return_counts=True)
        totals = generator.multinomial(counts.sum(), counts / counts.sum(), size=DRAWS) @ kinds
        return totals[:, 0] / totals[:, 1]


def summarize_set(loaded: LoadedSet, scores: Iterable[list], tau: float) -> tuple[dict, list]:
    """(numbers of a set, bins of its reliability diagram) from the scores of each record, in the records' order.

    Args:
        scores: K numbers, or a (K, K) matrix, for each record. tau: temperature of P = sigmoid(score / tau).

    Returns:
        score, score_low, score_high: the set's own number with its 95 % interval (bootstrap over prompts, by subset)
        averages: {average: {value, low, high}}, see aggregates.py
        subsets:  {subset: {n: records, pairs, accuracy, accuracy_low, accuracy_high, and what else its rule gives}}
        records, official, left_out, missing; and what `diagnostics.diagnose` says
    """
    matrices = [score_matrix(found) for found in scores]
    subsets: dict[str, Subset] = {}
    pairs: dict[str, int] = {}
    for record, matrix in zip(loaded.records, matrices, strict=True):
        subsets.setdefault(record.subset, Subset()).add(record, matrix)
        pairs[record.subset] = pairs.get(record.subset, 0) + len(record.pairs)
    subsets = dict(sorted(subsets.items()))  # whatever the order of the records, the same draws
    generator = np.random.default_rng(SEED)
    means = {name: {number: one.mean(number) for number in one.numbers} for name, one in subsets.items()}
    drawn = {name: {n: one.draws(n, generator) for n in one.numbers} for name, one in subsets.items()}
    weights = {name: float(one.sums(ACCURACY)[:, 1].sum()) for name, one in subsets.items()}
    averages = _averages(loaded.set.aggregate, means, drawn, weights)
    rows = {}
    for name, one in subsets.items():
        low, high = _interval(drawn[name][ACCURACY])
        counts = {"n": one.records, "pairs": pairs[name]}
        rows[name] = counts | means[name] | {"accuracy_low": low, "accuracy_high": high}
    score = next(iter(averages.values()))
    head = {"set": loaded.set.name, "title": loaded.set.title, "score": score["value"]}
    head |= {"score_low": score["low"], "score_high": score["high"], "records": len(loaded.records)}
    counts = {"official": loaded.set.official, "left_out": loaded.left_out, "missing": list(loaded.missing)}
    numbers, bins = diagnose(loaded.records, matrices, tau)
    return head | counts | {"averages": averages, "subsets": rows} | numbers, bins


def _interval(draws: np.ndarray | list[float] | None) -> list[float | None]:
    return [None, None] if draws is None else np.quantile(draws, INTERVAL).tolist()


def _averages(aggregate, means: dict, drawn: dict, weights: dict) -> dict[str, dict]:
    """{average: {value, low, high}}; without an interval where a subset has a single prompt."""
    values = aggregate(means, weights)
    columns: dict[str, list[float] | None] = dict.fromkeys(values)
    if all(draws is not None for numbers in drawn.values() for draws in numbers.values()):
        columns = {name: None if value is None else [] for name, value in values.items()}
        for draw in range(DRAWS):
            one = {name: {number: each[draw] for number, each in numbers.items()} for name, numbers in drawn.items()}
            found = aggregate(one, weights)
            for name in (name for name, column in columns.items() if column is not None):
                columns[name].append(found[name])
    rows = {}
    for name, value in values.items():
        low, high = _interval(columns[name])
        rows[name] = {"value": value, "low": low, "high": high}
    return rows
