"""What scores say beyond the number of a set, at no further cost: ties, calibration, length, cycles, the best response.

All over the stated pairs of all records, cycles and the best response over records of three responses or more.
"""

import math
from collections.abc import Iterable

import networkx
import numpy as np
import torch

from general_preference.evaluation.records import Record
from general_preference.evaluation.rules import pair_scores
from general_preference.inference.comparison import rank_correlation
from general_preference.inference.ranking import borda, hodge, nash
from general_preference.models import statistics
from general_preference.models.losses import preference_loss
from general_preference.models.score import preference_probability

ALIKE = 0.1  # lengths that differ by at most this share of the longer one are about the same
DIGITS = 6  # to which probabilities and Nash weights are compared
CHOOSERS = ("scalar", "borda", "nash")


def calibration(gains: np.ndarray, tau: float) -> tuple[dict[str, float], list[tuple[float, float, int]]]:
    """(numbers, bins of a reliability diagram) of M scores of winners over losers.

    tau: temperature of P(winner preferred) = sigmoid(score / tau). ties: share of scores that are exactly 0. ece:
    expected calibration error over 15 bins of confidence. brier: mean (1 - P)^2. log_loss: mean -log P, in nats.
    pair_accuracy: share on the right side, a tie counting one half. n: M.
    """
    score = torch.from_numpy(gains)
    label = torch.ones_like(score)
    sums = statistics.preference_sums(score, label, preference_loss(score, temperature=tau, label=label), tau)
    found = statistics.preference_statistics(sums)
    brier = (1 - preference_probability(score, tau)).square().mean().item()
    numbers = {"ties": found["ties"] / found["n"], "ece": found["calibration_error"], "brier": brier}
    numbers |= {"log_loss": found["loss"], "n": found["n"], "pair_accuracy": found["accuracy"]}
    return numbers, statistics.calibration_bins(sums)


def length_bias(gains: np.ndarray, winner: np.ndarray, loser: np.ndarray) -> dict:
    """How scores follow length.

    Args:
        gains: (M,) scores of winners over losers. winner, loser: (M,) their lengths.

    Returns:
        correlation: Spearman's of score and difference of length, every pair taken in both directions, so that it does
                     not depend on who won; None where one of them is constant
        preferred shorter, about as long, preferred longer: {accuracy, n} of the pairs whose winner is so; see `ALIKE`
    """
    difference = winner - loser
    both = [torch.from_numpy(np.concatenate([one, -one]).astype(float)) for one in (gains, difference)]
    correlation = rank_correlation(*both)
    alike = np.abs(difference) <= ALIKE * np.maximum(winner, loser)
    parts = {"preferred shorter": ~alike & (difference < 0), "about as long": alike}
    parts |= {"preferred longer": ~alike & (difference > 0)}
    right = gains > 0
    found = {"correlation": None if isinstance(correlation, str) else correlation}
    for name, part in parts.items():
        found[name] = {"accuracy": float(right[part].mean()) if part.any() else None, "n": int(part.sum())}
    return found


def has_cycle(scores: np.ndarray) -> bool:
    """Whether responses beat each other in a circle; a tie beats nobody. scores: (K, K)."""
    graph = networkx.from_numpy_array((scores > 0).astype(int), create_using=networkx.DiGraph)
    return not networkx.is_directed_acyclic_graph(graph)


def best_responses(scores: np.ndarray, tau: float) -> dict[str, set[int]]:
    """{chooser: the responses that it puts first} of (K, K) scores.

    scalar: the largest reward, of the rewards that fit the scores best (`ranking.hodge`). borda: the largest mean
    probability. nash: the largest weight in the von Neumann winner, or who loses to nobody.
    """
    matrix = torch.from_numpy(scores)
    probabilities = preference_probability(matrix, tau)
    unbeaten = set(np.flatnonzero((scores >= 0).all(axis=1)).tolist())
    columns = {"scalar": hodge(matrix).potential, "borda": borda(probabilities)}
    if not unbeaten:  # else the linear program is spared
        columns["nash"] = nash(probabilities)
    tops = {name: _largest(column) for name, column in columns.items()}
    return tops if "nash" in tops else tops | {"nash": unbeaten}


def _largest(column: torch.Tensor) -> set[int]:
    values = [round(value, DIGITS) for value in column.tolist()]
    return {index for index, value in enumerate(values) if value == max(values)}


def cycles_and_choices(matrices: Iterable[np.ndarray], tau: float) -> dict:
    """Of the (K, K) scores of records with K >= 3.

    Returns:
        n:            records
        cycles:       share with a decided cycle. cyclic_share: mean part of the squared scores that no ranking explains
        borda_not_scalar, nash_not_scalar, nash_not_borda: share in which one puts another response first, that is, no
                      response is first for both
    """
    count, cyclic, shares, apart = 0, 0, [], dict.fromkeys(("borda_not_scalar", "nash_not_scalar", "nash_not_borda"), 0)
    for scores in matrices:
        count += 1
        cyclic += has_cycle(scores)
        shares.append(hodge(scores).cyclic_share)
        tops = best_responses(scores, tau)
        for name in apart:
            one, other = name.split("_not_")
            apart[name] += not tops[one] & tops[other]
    if not count:
        return {"n": 0}
    parts = {name: value / count for name, value in apart.items()}
    return {"n": count, "cycles": cyclic / count, "cyclic_share": math.fsum(shares) / count} | parts


def diagnose(records: list[Record], matrices: list[np.ndarray], tau: float) -> tuple[dict, list]:
    """(ties and calibration, length, cycles of a set, bins of its reliability diagram)."""
    gains, winner, loser = [], [], []
    for record, scores in zip(records, matrices, strict=True):
        lengths = np.asarray(record.lengths)
        first, second = np.asarray(record.pairs).T
        gains.append(pair_scores(record, scores))
        winner.append(lengths[first])
        loser.append(lengths[second])
    gains, winner, loser = (np.concatenate(column) for column in (gains, winner, loser))
    numbers, bins = calibration(gains, tau)
    groups = (scores for scores in matrices if len(scores) > 2)
    return numbers | {"length": length_bias(gains, winner, loser), "groups": cycles_and_choices(groups, tau)}, bins
