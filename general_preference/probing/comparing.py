"""What seeds and comparisons say about heads: means with intervals, paired differences, and a verdict with care.

Pure functions of the scores of heads on one set of comparisons.
"""

from dataclasses import dataclass

import torch
from scipy import stats

from general_preference.inference.comparison import paired_difference
from general_preference.models.statistics import preference_credit, preference_statistics, preference_sums
from general_preference.probing.fitting import Scored
from general_preference.probing.states import Placed

LEVEL = 0.95
# Of fewer no verdict is given: among ten heads that guess one seemed different in 5 % of 80 simulated comparisons with
# 15 prompts, in 10 % with 10.
MIN_PROMPTS = 15
MEASURES = ("accuracy", "loss", "calibration_error")


@dataclass(frozen=True)
class Stated:
    """M preferences of a set: label (M,), cluster (M,) of the same prompt, longer (M,) sign of first's extra tokens."""

    label: torch.Tensor
    cluster: torch.Tensor
    longer: torch.Tensor


def stated_preferences(rows: list[Placed]) -> Stated:
    """What is asked of a head on these comparisons, in the order of `fitting.score_rows`."""
    numbers: dict[str, int] = {}
    label, cluster, longer = [], [], []
    for row in rows:
        label += row.label
        cluster += [numbers.setdefault(row.prompt_key, len(numbers))] * len(row.label)
        longer += [row.lengths[i] - row.lengths[j] for i, j in zip(row.first, row.second, strict=True)]
    return Stated(torch.tensor(label).double(), torch.tensor(cluster), torch.tensor(longer).double().sign())


def seed_interval(values: list[float]) -> dict[str, float | None]:
    """{mean, low, high} of numbers, one a seed, 95 % by Student's t; a single one has no interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    mean = sample.mean().item()
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * sample.std().item() / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def expanded_level(level: float, count: int) -> float:
    """The level at which percentiles of a bootstrap over `count` units cover about `level`.

    Plain percentiles are too narrow for few units: by sqrt((n - 1) / n), and as a normal is beside Student's t.
    Source: Hesterberg, arXiv 1411.5279, section 4.1 (the expanded percentile interval).
    """
    if count < 2:
        return level
    deviations = (count / (count - 1)) ** 0.5 * stats.t.ppf((1 + level) / 2, count - 1)
    return float(1 - 2 * stats.norm.sf(deviations))


def compare_scores(scored: dict[str, list[Scored]], stated: Stated) -> dict[str, dict]:
    """{head: numbers} from each head's scores, one `Scored` a seed; the others are compared with the first head.

    Returns, fit for JSON:
        accuracy, loss, calibration_error: {mean, low, high, each}, the interval over seeds; loss in nats
        longer:     share of decisions for the longer response, of responses that differ in length
        difference: of accuracies from the first head, seeds with equal numbers paired:
                    {difference, low, high, better, worse, p_value} of the credit averaged over seeds, see
                    `paired_difference`, resampling prompts, whose intervals are simultaneous: 95 % for all heads
                    together (Bonferroni), see `expanded_level`; seeds: its {mean, low, high}, 95 % for each head
        loss_difference: the same of losses
        verdict:    "better" or "worse" if both intervals of the accuracy are on one side of 0, else "no difference";
                    below `MIN_PROMPTS` "too few prompts"
    """
    (baseline, *_), rows, prompts = scored, {}, len(stated.cluster.unique())
    level = expanded_level(1 - (1 - LEVEL) / max(1, len(scored) - 1), prompts)
    credits = {name: torch.stack([preference_credit(one.score, stated.label) for one in some])
               for name, some in scored.items()}  # fmt: skip
    losses = {name: torch.stack([one.loss for one in some]) for name, some in scored.items()}
    for name, some in scored.items():
        each = [_statistics(one, stated) for one in some]
        rows[name] = {
            key: seed_interval([one[key] for one in each]) | {"each": [one[key] for one in each]} for key in MEASURES
        }
        rows[name] |= {"n": each[0]["n"], "longer": _longer(some, stated)}
        if name != baseline:
            rows[name]["difference"] = found = _difference(credits[baseline], credits[name], stated, level)
            rows[name]["loss_difference"] = _difference(losses[baseline], losses[name], stated, level)
            rows[name]["verdict"] = _verdict(found) if prompts >= MIN_PROMPTS else "too few prompts"
    return rows


def _statistics(one: Scored, stated: Stated) -> dict[str, float]:
    return preference_statistics(preference_sums(one.score, stated.label, one.loss, one.temperature))


def _longer(some: list[Scored], stated: Stated) -> float | None:
    differ = stated.longer != 0
    if not differ.any():
        return None
    signs = torch.stack([one.score.sign()[differ] for one in some])
    return ((signs * stated.longer[differ] + 1) / 2).mean().item()


def _difference(first: torch.Tensor, other: torch.Tensor, stated: Stated, level: float) -> dict:
    found = paired_difference(first.mean(dim=0), other.mean(dim=0), stated.cluster, level)
    return found | {"seeds": seed_interval((other - first).mean(dim=1).tolist())}


def _verdict(difference: dict) -> str:
    intervals = [one for one in (difference, difference["seeds"]) if one["low"] is not None]
    if intervals and all(one["low"] > 0 for one in intervals):
        return "better"
    if intervals and all(one["high"] < 0 for one in intervals):
        return "worse"
    return "no difference"


def longer_accuracy(stated: Stated) -> float:
    """Accuracy of the rule that the longer response is preferred; equal lengths tie."""
    return preference_credit(stated.longer, stated.label).mean().item()
