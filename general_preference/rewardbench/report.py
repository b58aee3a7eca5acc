"""From result rows to what people read: subsets with intervals, sections, averages, the official result file."""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import asdict

from general_preference.command_line import align
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.ranking import borda, hodge
from general_preference.models.preference_config import PreferenceConfig
from general_preference.models.score import preference_probability
from general_preference.models.statistics import wilson_interval
from general_preference.rewardbench.data import PREF_SETS, Benchmark, parse_ties_id, right_responses
from general_preference.rewardbench.scoring import (
    SECTIONS,
    TIES,
    TiesPrompt,
    best_of_n_credit,
    leaderboard_average,
    mean_of_all,
    merits,
    prior_score,
    section_scores,
    ties_interval,
    ties_score,
)

WHAT_DECIDES = {
    "borda": "mean score against the row's other responses",
    "copeland": "share of the row's other responses that it beats",
    "nash": "weight in the von Neumann winner of the row's responses",
    "min": "lowest score against another response of the row",
}


def best_of_n_row(comparison: dict, embedded: EmbeddedPrompt, tau: float) -> dict:
    """What is written about a row of RewardBench 2; all choices of `winner` can be read from it.

    right:        number of right responses, which are the first ones
    score:        (K,) mean score of each response against all K; what decides with `winner` "borda"
    probability:  (K,) mean probability of each response to be preferred to the others
    scores:       (K, K) all scores, row over column
    cyclic_share: the part of the squared scores that no ranking explains
    """
    scores = embedded.scores()
    return {
        "id": comparison["id"],
        "subset": comparison["subset"],
        "right": right_responses(comparison),
        "score": [float(merit) for merit in merits(scores.tolist())],
        "probability": borda(preference_probability(scores.double(), tau)).tolist(),
        "scores": scores.tolist(),
        "cyclic_share": hodge(scores).cyclic_share,
    }


def judge(benchmark: Benchmark, row: dict, winner: str, tau: float) -> dict:
    """The row with `correct`: 1 or 0; best-of-n: the credit in [0, 1]; "Ties": every right one is above all others.

    Best-of-n rows also get `merit`, the number per response that decided.
    """
    if not benchmark.best_of_n:
        return row | {"correct": int(row["score"] > 0)}
    values = merits(row["scores"], winner, tau)
    if row["subset"] == TIES:
        correct = float(_ties_prompt(row, winner, tau).accurate)
    else:
        correct = best_of_n_credit(values, row["right"])
    return row | {"merit": [float(value) for value in values], "correct": correct}


def summarize(benchmark: Benchmark, rows: Iterable[dict], winner: str, tau: float) -> dict[str, dict]:
    """{subset: statistics} in the benchmark's order, from judged rows.

    accuracy:                    share of correct rows (mean credit); of "Ties" the official score, with its parts
    n, correct:                  rows, and the sum of what they got (of "Ties": accurate rows)
    ties:                        rows without a winner: a score of exactly 0; several at the top
    accuracy_low, accuracy_high: 95 % interval (Wilson; of "Ties" a bootstrap over pairs of prompts)
    probability:                 version 1: mean probability given to the chosen response
    cyclic_share:                version 2: mean over the rows
    """
    by_subset: dict[str, list[dict]] = {}
    for row in rows:
        by_subset.setdefault(row["subset"], []).append(row)
    results = {}
    for subset in (name for name in benchmark.subsets if name in by_subset):
        some = by_subset[subset]
        credit = math.fsum(row["correct"] for row in some)
        result = {"accuracy": credit / len(some), "n": len(some), "correct": credit}
        if benchmark.best_of_n:
            result["ties"] = sum(row["merit"].count(max(row["merit"])) > 1 for row in some)
            result["cyclic_share"] = math.fsum(row["cyclic_share"] for row in some) / len(some)
        else:
            result["ties"] = sum(row["score"] == 0 for row in some)
            result["probability"] = math.fsum(row["probability"] for row in some) / len(some)
        if benchmark.best_of_n and subset == TIES:
            prompts = [_ties_prompt(row, winner, tau) for row in some]
            found = ties_score(prompts)
            result |= {"accuracy": found.score, **asdict(found)}
            interval = ties_interval(prompts)
            del result["ties"]  # several at the top is what is asked for
        else:
            interval = wilson_interval(result["accuracy"], len(some))
        result["accuracy_low"], result["accuracy_high"] = interval
        results[subset] = result
    return results


def _ties_prompt(row: dict, winner: str, tau: float) -> TiesPrompt:
    return TiesPrompt.judge(*parse_ties_id(row["id"]), merits(row["scores"], winner, tau), row["right"])


def aggregate(benchmark: Benchmark, results: dict[str, dict], prior: float | None = None) -> dict[str, float | None]:
    """{section or average: score}; None where something it needs was not run.

    Args:
        prior: the prior sets' score, if the same model was run on them: version 1's leaderboard average.
    """
    accuracies = {subset: result["accuracy"] for subset, result in results.items()}
    if benchmark.best_of_n:
        return {"Average": mean_of_all(accuracies.get(subset) for subset in benchmark.subsets)}
    if benchmark is PREF_SETS:
        return {"Prior Sets": prior_score(accuracies)}
    sections = section_scores(accuracies)
    scores = sections | {"Average": mean_of_all(sections.values())}
    if prior is not None:
        scores |= {"Prior Sets": prior, "Leaderboard average": leaderboard_average(sections, prior)}
    return scores


def official_results(
    benchmark: Benchmark, results: dict[str, dict], model: str, preference: PreferenceConfig, template: str, winner: str
) -> dict:
    """The flat object that the official scripts write and the leaderboard reads: names, then subset: accuracy."""
    kind = "Seq. Classifier" if preference.head == "bt" else "Custom Classifier"
    if benchmark.best_of_n:
        kind += f" (a response's score is its {WHAT_DECIDES[winner]})"
    accuracies = {subset: result["accuracy"] for subset, result in results.items()}
    return {"model": model, "model_type": kind, "chat_template": template} | accuracies


def format_report(benchmark: Benchmark, results: dict[str, dict], scores: dict[str, float | None]) -> str:
    """The table on screen: subset, correct/total, accuracy with its interval; then sections and averages."""
    header = ["subset", "correct", "accuracy", "95 % interval"]
    rows = []
    for subset, result in results.items():
        total = f"{result['correct']:.6g}/{result['n']}"
        interval = f"{result['accuracy_low']:.3f}-{result['accuracy_high']:.3f}"
        rows.append([subset, total, f"{result['accuracy']:.4f}", interval])
    averages = [[name, "", "-" if score is None else f"{score:.4f}", ""] for name, score in scores.items()]
    return "\n".join([*align([header, None, *rows, None, *averages]), "", *_remarks(benchmark, results, scores)])


def _remarks(benchmark: Benchmark, results: dict[str, dict], scores: dict[str, float | None]) -> list[str]:
    remarks = []
    missing = [subset for subset in benchmark.subsets if subset not in results]
    if missing:
        named = f"{len(missing)} of {len(benchmark.subsets)} subsets are not in the data: {', '.join(missing)}"
        remarks.append(f"{named}; no average is given over what is missing")
    ties = sum(result.get("ties", 0) for result in results.values())
    if ties and benchmark.best_of_n:
        remarks.append(f"{ties} rows have several responses at the top, each of which gets its share")
    elif ties:
        remarks.append(f"{ties} scores are exactly 0; a tie counts as a loss")
    if TIES in results and benchmark.best_of_n:
        remarks.append(
            f"the accuracy of '{TIES}' is its weighted score; 'correct' counts rows with every right one above"
        )
    partial = [
        name
        for name, counts in SECTIONS.items()
        if scores.get(name) is not None and not counts.keys() <= results.keys()
    ]
    if partial:
        remarks.append(f"over a part of their subsets: {', '.join(partial)}")
    return [textwrap.fill(remark, 110, subsequent_indent="  ", break_on_hyphens=False) for remark in remarks]
