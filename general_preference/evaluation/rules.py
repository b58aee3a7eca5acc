"""The rules of evaluation sets: what the scores of one record earn. Pure functions of numbers.

    pairs   each pair on its own: right if the winner scores higher; a tie is wrong. "second" is the same where a tie
            counts as a verdict for response 1 (JudgeBench), "graph" where the pairs are the edges of one partial order
    best    the right response, the first of K, has the largest number; several at the top share the credit. "ties" is
            RewardBench 2's own rule for several right responses
    all     response 0 beats every other one
    styles  three right by three wrong responses, in the order concise, detailed, Markdown (RM-Bench)

A rule returns {number: (credit, weight)}; the mean of a subset is the sum of credits over the sum of weights.
"""

import math

import numpy as np

from general_preference.evaluation.records import Record
from general_preference.evaluation.rewardbench.scoring import best_of_n_credit
from general_preference.inference.ranking import response_scores

PAIRS, SECOND, GRAPH, BEST, TIED, ALL, STYLES = RULES = ("pairs", "second", "graph", "best", "ties", "all", "styles")
ACCURACY = "accuracy"  # the number that every rule gives

Credits = dict[str, tuple[float, float]]


def score_matrix(scores: list) -> np.ndarray:
    """(K, K) scores, row over column, in float64, from K numbers (s_i - s_j) or from the matrix itself."""
    values = np.asarray(scores, dtype=np.float64)
    return values[:, None] - values[None, :] if values.ndim == 1 else values


def pair_scores(record: Record, scores: np.ndarray) -> np.ndarray:
    """(M,) score of each winner over its loser: the pair's own score, for a scalar model s_winner - s_loser."""
    winners, losers = np.asarray(record.pairs).T
    return scores[winners, losers]


def grade_record(record: Record, scores: np.ndarray) -> Credits:
    """What `scores` (K, K) earn by the record's rule; see the head of this file.

    Besides "accuracy": "tau_b" of graphs; "hard", "normal", "easy" of styles; and where one of K is to be chosen both
    readings of "the best": "maximum" (largest mean score against all K) and "beats_all" (each pair on its own), which
    agree for scalar scores without ties. "accuracy" is the official one of the two.
    """
    gains = pair_scores(record, scores)
    right = gains > 0
    if record.rule == SECOND:
        right = right | ((gains == 0) & (np.asarray(record.pairs)[:, 0] == 1))
    if record.rule in (PAIRS, SECOND):
        return {ACCURACY: (float(right.sum()), float(len(right)))}
    if record.rule == GRAPH:
        return {ACCURACY: (float(right.mean()), 1.0), "tau_b": (kendall_tau_b(gains), 1.0)}
    if record.rule == STYLES:
        return style_credits(gains.reshape(3, 3))
    beats_all = (float(right.all()), 1.0)
    if record.rule == TIED:
        return {ACCURACY: beats_all}
    maximum = (best_of_n_credit(response_scores(scores)), 1.0)
    official = {BEST: maximum, ALL: beats_all}[record.rule]
    return {ACCURACY: official, "maximum": maximum, "beats_all": beats_all}


def kendall_tau_b(gains: np.ndarray) -> float:
    """(C - D) / max(1, sqrt((C + D) (C + D + T))) of the stated edges: C right, D wrong, T tied. (IF-RewardBench)"""
    concordant, discordant = int((gains > 0).sum()), int((gains < 0).sum())
    decided = concordant + discordant
    return (concordant - discordant) / max(1.0, math.sqrt(decided * len(gains)))


def style_credits(gains: np.ndarray) -> Credits:
    """RM-Bench. gains: (3, 3) score of right response i over wrong response j, by style.

    hard: the right one is plainer (i < j). normal: same style. easy: the right one is fancier. accuracy: their mean.
    """
    right = gains > 0
    parts = {"hard": np.triu(right, 1), "normal": np.diag(right), "easy": np.tril(right, -1)}
    credits = {name: (float(part.sum()), 3.0) for name, part in parts.items()}
    return {ACCURACY: (sum(credit for credit, _ in credits.values()), 9.0)} | credits
