"""From the means of subsets to the number of a set, as its authors take it. Pure functions of numbers.

means:   {subset: {number: mean}}, "accuracy" in each. weights: {subset: what the mean of "accuracy" was taken over}
returns: {average: value}, "score" first: what stands in the table. None where a subset that belongs to it was not
         run; parts of a score have their own names
"""

from collections.abc import Callable, Mapping

from general_preference.evaluation.rewardbench.scoring import (
    ROWS_1,
    ROWS_2,
    mean_of_all,
    prior_score,
    section_scores,
)
from general_preference.evaluation.rules import ACCURACY

SCORE = "score"
LANGUAGE_MARK = "/"  # between language and subset of M-RewardBench
DOMAINS = ("chat", "code", "math", "safety")
JUDGEBENCH_SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
CORRECTNESS = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
RMB_SECTIONS = tuple(
    f"{kind}/{goal}" for kind in ("Pairwise_set", "BoN_set") for goal in ("Helpfulness", "Harmlessness")
)
INSTRUCTION_TYPES = ("Single_Turn", "Multi_Turn", "System_Prompt")

Means = Mapping[str, Mapping[str, float]]
Averages = dict[str, float | None]
Aggregate = Callable[[Means, Mapping[str, float]], Averages]


def _accuracies(means: Means) -> dict[str, float]:
    return {subset: numbers[ACCURACY] for subset, numbers in means.items()}


def _pooled(means: Means, weights: Mapping[str, float], number: str = ACCURACY) -> float:
    """Over all subsets together."""
    return sum(means[subset][number] * weights[subset] for subset in means) / sum(weights[subset] for subset in means)


def _mean_over(parts: tuple[str, ...], means: Means, number: str = ACCURACY) -> float | None:
    return mean_of_all(means[part][number] if part in means else None for part in parts)


def pooled_accuracy(means: Means, weights: Mapping[str, float]) -> Averages:
    """PPE Preference: over all rows."""
    return {SCORE: _pooled(means, weights)}


def rewardbench_sections(means: Means, weights: Mapping[str, float]) -> Averages:
    """RewardBench: four sections weighted by the official example counts, and their mean."""
    sections = section_scores(_accuracies(means))
    return {SCORE: mean_of_all(sections.values()) if ROWS_1.keys() <= means.keys() else None} | sections


def rewardbench_2_mean(means: Means, weights: Mapping[str, float]) -> Averages:
    """RewardBench 2: the mean of six subsets."""
    return {SCORE: _mean_over(tuple(ROWS_2), means)}


def prior_sets_mean(means: Means, weights: Mapping[str, float]) -> Averages:
    """The prior sets: the mean of the four that RewardBench's leaderboard counts."""
    return {SCORE: prior_score(_accuracies(means))}


def correctness_mean(means: Means, weights: Mapping[str, float]) -> Averages:
    """PPE Correctness: the mean of five sets, each over its conflict pairs."""
    return {SCORE: _mean_over(CORRECTNESS, means)}


def rmb_mean(means: Means, weights: Mapping[str, float]) -> Averages:
    """RMB: the mean of four sections; and of the best-of-n sections by the largest mean score instead."""
    both = {part: means[part].get("maximum") for part in RMB_SECTIONS[2:] if part in means}
    maximum = mean_of_all(both.get(part) for part in RMB_SECTIONS[2:])
    return {SCORE: _mean_over(RMB_SECTIONS, means), "best of n by maximum": maximum}


def rm_bench_mean(means: Means, weights: Mapping[str, float]) -> Averages:
    """RM-Bench: the mean of four domains; hard, normal and easy are the means of theirs."""
    parts = {number: _mean_over(DOMAINS, means, number) for number in ("hard", "normal", "easy")}
    return {SCORE: _mean_over(DOMAINS, means)} | parts


def judgebench_accuracy(means: Means, weights: Mapping[str, float]) -> Averages:
    """JudgeBench: over all pairs (the authors' Overall); macro is the mean of the four sources."""
    return {SCORE: _pooled(means, weights), "macro": _mean_over(JUDGEBENCH_SOURCES, means)}


def multilingual_mean(means: Means, weights: Mapping[str, float]) -> Averages:
    """M-RewardBench: the mean over the languages that are there, each as RewardBench."""
    languages: dict[str, dict[str, dict]] = {}
    for subset, numbers in means.items():
        language, _, own = subset.partition(LANGUAGE_MARK)
        languages.setdefault(language, {})[own] = numbers
    each = {language: rewardbench_sections(own, {})[SCORE] for language, own in languages.items()}
    return {SCORE: mean_of_all(each.values())} | each


def instruction_types_mean(means: Means, weights: Mapping[str, float]) -> Averages:
    """IF-RewardBench: accuracy and tau_b, each the mean over the instruction types that are there, of their records."""
    found = tuple(kind for kind in INSTRUCTION_TYPES if kind in means)
    pooled = {f"{number}, all records": _pooled(means, weights, number) for number in (ACCURACY, "tau_b")}
    return {SCORE: _mean_over(found, means), "tau_b": _mean_over(found, means, "tau_b")} | pooled
