"""Models on the same comparisons: accuracies, paired differences, agreement. Called by eval/compare_models.py.

All statistics are pure functions of numbers per comparison; `compare_models` puts them together.
"""

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from general_preference.inference.results import CREDIT, Decision, ModelResults
from general_preference.models.statistics import wilson_interval

ALL, RESAMPLES, SEED = "all", 10_000, 0
DRAWN = 10**7  # numbers at a time: of 10,000 different clusters all resamples would take gigabytes


def paired_difference(
    first: Tensor, other: Tensor, cluster: Tensor, level: float = 0.95
) -> dict[str, float | int | None]:
    """How much more credit `other` gets than `first`.

    Args:
        first, other: (M,) credit in [0, 1] on the same comparisons. cluster: (M,) integers, equal for comparisons that
            are resampled together. level: of the interval, 95 %.

    Returns:
        difference:  mean of other - first
        low, high:   its interval: percentiles of `RESAMPLES` bootstrap means over clusters drawn with replacement
                     (Efron 1979); None with a single cluster
        better, worse: comparisons on which `other` gets more, and less
        p_value:     two-sided exact sign test of better against worse, for credits 0 and 1 the exact test of McNemar
                     (1947); as if comparisons were independent; 1 if none differs
    """
    gain = other - first
    _, index = cluster.unique(return_inverse=True)
    sums = gain.new_zeros(int(index.max()) + 1, 2).index_add_(0, index, torch.stack([gain, torch.ones_like(gain)], 1))
    # Clusters with the same sums are exchangeable: how often each kind is drawn is multinomial, exactly.
    kinds, counts = sums.unique(dim=0, return_counts=True)
    interval = [None, None]
    if len(sums) > 1:
        shares = counts.double() / len(sums)
        shares[-1] = 1 - shares[:-1].sum()  # scipy refuses shares whose sum is rounded
        law, random = stats.multinomial(len(sums), shares.numpy()), np.random.RandomState(SEED)
        portion, means = max(1, DRAWN // len(sums)), []
        for start in range(0, RESAMPLES, portion):
            drawn = law.rvs(min(portion, RESAMPLES - start), random_state=random)
            totals = torch.from_numpy(drawn).double() @ kinds
            means.append(totals[:, 0] / totals[:, 1])
        ends = kinds.new_tensor([(1 - level) / 2, (1 + level) / 2])
        interval = torch.quantile(torch.cat(means), ends).tolist()
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    p_value = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    found = {"difference": gain.mean().item(), "low": interval[0], "high": interval[1]}
    return found | {"better": better, "worse": worse, "p_value": p_value}


def rank_correlation(first: Tensor, other: Tensor) -> float | str:
    """Spearman's correlation of (M,) numbers; "constant" where one side has a single value, which has no ranks."""
    if min(len(first.unique()), len(other.unique())) < 2:
        return "constant"
    return float(stats.spearmanr(first.numpy(), other.numpy()).statistic)


def compare_models(files: dict[str, ModelResults], top: int = 10) -> dict:
    """Everything that is reported on {label: results of the same rows}, the first being the baseline. Fit for JSON.

    Returns:
        kind, credit, baseline, resamples, seed; rows and comparisons (numbers of them)
        models:     {label: {file, settings, results: {subset: {accuracy, accuracy_low, accuracy_high, n, ties}}}}, the
                    interval as if comparisons were independent
        against_baseline: {label: {results: {subset: {n, `paired_difference`, agreement, spearman}}, most_different}},
                    agreement the share of comparisons with the same decision, spearman of scores, most_different the
                    `top` other decisions with the largest difference of probability of the preferred response
        agreement:  {label: {label: share}}
    """
    (baseline, first), *others = files.items()
    names = [row["subset"] for row in first.rows]
    subset_of = [names[one.row] for one in first.decisions]
    members = {name: [i for i, own in enumerate(subset_of) if own == name] for name in dict.fromkeys(names)}
    members = {name: index for name, index in members.items() if name not in ("", ALL)}
    members[ALL] = list(range(len(subset_of)))
    models = {}
    for label, file in files.items():
        results = {name: _accuracy([file.decisions[i] for i in index]) for name, index in members.items()}
        models[label] = {"file": str(file.path), "settings": file.settings, "results": results}
    against = {}
    for label, file in others:
        results = {name: _pair(first.decisions, file.decisions, index) for name, index in members.items()}
        against[label] = {"results": results, "most_different": _most_different(files, baseline, label, top)}
    decided = {label: file.decisions for label, file in files.items()}
    agreement = {a: {b: _agreement(decided[a], decided[b]) for b in files} for a in files}
    counts = {"rows": len(first.rows), "comparisons": len(first.decisions), "resamples": RESAMPLES, "seed": SEED}
    head = {"kind": first.kind, "credit": CREDIT[first.kind], "baseline": baseline}
    return head | counts | {"models": models, "against_baseline": against, "agreement": agreement}


def _accuracy(decisions: list[Decision]) -> dict[str, float | int]:
    n = len(decisions)
    accuracy = sum(one.credit for one in decisions) / n
    low, high = wilson_interval(accuracy, n)
    ties = sum(one.tie for one in decisions)
    return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "n": n, "ties": ties}


def _pair(first: list[Decision], other: list[Decision], index: list[int]) -> dict:
    first, other = ([decisions[i] for i in index] for decisions in (first, other))
    names = {cluster: number for number, cluster in enumerate(dict.fromkeys(one.cluster for one in first))}
    cluster = torch.tensor([names[one.cluster] for one in first])
    credits, scores = (
        [torch.tensor([getattr(one, name) for one in side], dtype=torch.float64) for side in (first, other)]
        for name in ("credit", "score")
    )
    row = {"n": len(index), **paired_difference(*credits, cluster)}
    return row | {"agreement": _agreement(first, other), "spearman": rank_correlation(*scores)}


def _agreement(first: list[Decision], other: list[Decision]) -> float:
    return sum(one.preferred == two.preferred for one, two in zip(first, other, strict=True)) / len(first)


def _most_different(files: dict[str, ModelResults], baseline: str, label: str, top: int) -> list[dict]:
    rows, first, other = files[baseline].rows, files[baseline].decisions, files[label].decisions
    both = [(one, two) for one, two in zip(first, other, strict=True) if one.preferred != two.preferred]
    both.sort(key=lambda pair: -abs(pair[0].probability - pair[1].probability))
    found = []
    for one, two in both[:top]:
        place = {"row": one.row + 1, "id": rows[one.row]["id"], "subset": rows[one.row]["subset"]}
        place |= {"preferred": one.between[0], "other": one.between[1]} if one.between else {}
        found.append(place | {"probability": {baseline: one.probability, label: two.probability}})
    return found
