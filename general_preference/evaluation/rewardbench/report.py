"""From result rows to what people read: subsets with intervals, sections, averages, the official result file."""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import asdict

from general_preference.cli import format_table
from general_preference.evaluation.rewardbench import scoring
from general_preference.evaluation.rewardbench.data import PREF_SETS, Benchmark, parse_ties_id, right_responses
from general_preference.evaluation.rewardbench.scoring import SECTIONS, TIES, TiesPrompt
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.ranking import borda, hodge, response_scores
from general_preference.models.config import PreferenceConfig
from general_preference.models.score import preference_probability
from general_preference.models.statistics import wilson_interval

WHAT_DECIDES = {
    "borda": "mean score against all responses of the row",
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
        "score": list(map(float, response_scores(scores))),
        "probability": borda(preference_probability(scores.double(), tau)).tolist(),
        "scores": scores.tolist(),
        "cyclic_share": hodge(scores).cyclic_share,
    }


def grade(benchmark: Benchmark, row: dict, winner: str, tau: float) -> tuple[dict, TiesPrompt | None]:
    """(the row with `correct`, what a row of "Ties" adds to its score).

    correct: 1 or 0; best-of-n: the credit in [0, 1]; "Ties": whether every right response is above all others
    merit:   of best-of-n rows, the number per response that decided
    """
    if not benchmark.best_of_n:
        return row | {"correct": int(row["score"] > 0)}, None
    values = response_scores(row["scores"], winner, tau)
    ties = row["subset"] == TIES
    prompt = TiesPrompt.grade(*parse_ties_id(row["id"]), values, row["right"]) if ties else None
    correct = scoring.best_of_n_credit(values) if prompt is None else float(prompt.accurate)
    return row | {"merit": list(map(float, values)), "correct": correct}, prompt


def summarize_subsets(benchmark: Benchmark, graded: Iterable[tuple[dict, TiesPrompt | None]]) -> dict[str, dict]:
    """{subset: statistics} in the benchmark's order, from what `grade` says of each row.

    accuracy:                    share of correct rows (mean credit); of "Ties" the official score, with its parts
    n, official:                 rows, and how many the official set has
    correct:                     the sum of what the rows got (of "Ties": accurate rows)
    ties:                        rows without a single winner: a score of exactly 0; several at the top (not "Ties")
    accuracy_low, accuracy_high: 95 % interval (Wilson; of "Ties" a bootstrap over pairs of prompts)
    probability:                 version 1: mean probability given to the chosen response
    cyclic_share:                version 2: mean over the rows
    unpaired:                    "Ties": prompts whose partner is not in the data
    """
    by_subset: dict[str, list[tuple[dict, TiesPrompt | None]]] = {}
    for row, prompt in graded:
        by_subset.setdefault(row["subset"], []).append((row, prompt))
    results = {}
    for subset in filter(by_subset.get, benchmark.rows):
        rows, prompts = (list(column) for column in zip(*by_subset[subset], strict=True))
        credit = math.fsum(row["correct"] for row in rows)
        result = {"accuracy": credit / len(rows), "n": len(rows), "official": benchmark.rows[subset], "correct": credit}
        kind = "cyclic_share" if benchmark.best_of_n else "probability"
        result[kind] = math.fsum(row[kind] for row in rows) / len(rows)
        if benchmark.best_of_n and subset == TIES:
            found, interval = scoring.ties_score(prompts), scoring.ties_interval(prompts)
            kinds = [{prompt.number for prompt in prompts if prompt.kind == kind} for kind in ("ref", "tied")]
            result |= {"accuracy": found.score, **asdict(found), "unpaired": len(kinds[0] ^ kinds[1])}
        else:
            interval = wilson_interval(result["accuracy"], len(rows))
            tops = (row["merit"].count(max(row["merit"])) if benchmark.best_of_n else row["score"] for row in rows)
            result["ties"] = sum(top > 1 if benchmark.best_of_n else top == 0 for top in tops)
        result["accuracy_low"], result["accuracy_high"] = interval
        results[subset] = result
    return results


def aggregate(benchmark: Benchmark, results: dict[str, dict], prior: float | None = None) -> dict[str, float | None]:
    """{section or average: score}; a section is over its subsets that were run, an average None unless all were.

    Args:
        prior: the prior sets' score, if the same model was run on them: version 1's leaderboard average.
    """
    accuracies = {subset: result["accuracy"] for subset, result in results.items()}
    if benchmark is PREF_SETS:
        return {"Prior Sets": scoring.prior_score(accuracies)}
    complete = benchmark.rows.keys() <= results.keys()
    if benchmark.best_of_n:
        return {"Average": scoring.mean_of_all(accuracies.values()) if complete else None}
    sections = scoring.section_scores(accuracies)
    both = {"Average": scoring.mean_of_all(sections.values())}
    if prior is not None:
        both |= {"Prior Sets": prior, "Leaderboard average": scoring.leaderboard_average(sections, prior)}
    return sections | {name: score if complete or name == "Prior Sets" else None for name, score in both.items()}


def official_results(
    benchmark: Benchmark, results: dict[str, dict], model: str, preference: PreferenceConfig, template: str, winner: str
) -> dict:
    """The flat object that the official scripts write and the leaderboard reads: names, then subset: accuracy.

    Where a version 2 result does not come from the official rule, `response_score` says from what.
    """
    model_type = "Seq. Classifier" if preference.head == "bt" else "Custom Classifier"
    names = {"model": model, "model_type": model_type, "chat_template": template}
    if benchmark.best_of_n and (preference.head, winner) != ("bt", "borda"):
        names["response_score"] = f"{winner}: {WHAT_DECIDES[winner]}"
    return names | {subset: result["accuracy"] for subset, result in results.items()}


def format_report(benchmark: Benchmark, results: dict[str, dict], scores: dict[str, float | None]) -> str:
    """The tables on screen: subsets, sections and averages, then remarks."""
    rows = {}
    for subset, result in results.items():
        interval = f"{result['accuracy_low']:.3f}-{result['accuracy_high']:.3f}"
        correct = f"{result['correct']:.6g}/{result['n']}"
        rows[subset] = {"correct": correct, "accuracy": result["accuracy"], "95 % interval": interval}
    averages = {name: {"score": score} for name, score in scores.items()}
    tables = format_table(rows, "subset", None), format_table(averages, "section", None)
    return "\n\n".join([*tables, "\n".join(_remarks(benchmark, results, scores))])


def picture_labels(benchmark: Benchmark) -> tuple[dict[str, str], dict[str, float]]:
    """({subset: section}, {subset: accuracy of guessing}) for `plots.draw_subsets`."""
    sections = {subset: section for section, subsets in SECTIONS.items() for subset in subsets}
    if benchmark.best_of_n:
        return {}, {subset: 0.25 for subset in benchmark.rows if subset != TIES}
    return sections, dict.fromkeys(benchmark.rows, 0.5)


def _remarks(benchmark: Benchmark, results: dict[str, dict], scores: dict[str, float | None]) -> list[str]:
    """What a reader of the numbers has to know."""
    remarks, missing = [], [subset for subset in benchmark.rows if subset not in results]
    if any(result["n"] != result["official"] for result in results.values()) or missing:
        rows, official = sum(result["n"] for result in results.values()), sum(benchmark.rows.values())
        counts = f"{rows} rows in {len(results)} subsets; officially {official} in {len(benchmark.rows)}"
        remarks.append(f"{counts}: not comparable with published numbers")
    if missing:
        remarks.append(f"not in the data: {', '.join(missing)}")
    run = (name for name in SECTIONS if scores.get(name) is not None)
    if partial := [name for name in run if not SECTIONS[name].keys() <= results.keys()]:
        remarks.append(f"over a part of their subsets: {', '.join(partial)}")
    if ties := sum(result.get("ties", 0) for result in results.values()):
        means = "have several responses at the top, which share the credit" if benchmark.best_of_n else "tie, a loss"
        remarks.append(f"{ties} rows {means}")
    if TIES in results and benchmark.best_of_n:
        remarks.append(f"the accuracy of '{TIES}' is its weighted score; 'correct' counts rows with all right on top")
        if results[TIES]["unpaired"]:
            remarks.append(f"{results[TIES]['unpaired']} prompts of '{TIES}' have no partner: no margins counted")
    return [textwrap.fill(remark, 110, subsequent_indent="  ", break_on_hyphens=False) for remark in remarks]
