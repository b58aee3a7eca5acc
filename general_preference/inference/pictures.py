"""Pictures of a batch run: whether probabilities mean what they say, and how accurate each subset is."""

from pathlib import Path

from general_preference.models.statistics import wilson_interval
from general_preference.plotting import load_pyplot

_POINT, _BAR = "#1f3b5c", "#9db4cc"
MAX_SUBSETS = 40


def draw_reliability(bins: list[tuple[float, float, int]], results: dict[str, dict], path: Path) -> bool:
    """Reliability diagram, and accuracy per subset with 95 % intervals; False if not drawn.

    Args:
        bins: (mean confidence, share that came out so, count), as `statistics.calibration_bins` gives them.
        results: {subset: statistics} of `batch_inference.ResultSummary`; only the first `MAX_SUBSETS` and the last fit.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    names = list(results)
    names = names[:MAX_SUBSETS] + names[-1:] if len(names) > MAX_SUBSETS + 1 else names
    height = max(4.4, 1.2 + 0.28 * len(names))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, height), constrained_layout=True)

    confidence, outcome, counts = zip(*bins, strict=True)
    total = sum(counts)
    left.bar(confidence, [count / total for count in counts], width=0.028, color=_BAR, label="share of preferences")
    left.plot([0.5, 1], [0.5, 1], color="0.6", lw=1, ls="--", label="calibrated")
    low, high = zip(*(wilson_interval(share, count) for _, share, count in bins), strict=True)
    left.vlines(confidence, low, high, color="0.6", lw=1)
    left.plot(confidence, outcome, "o-", color=_POINT, ms=5, lw=1.2, label="observed share")
    error = results[names[-1]]["calibration_error"]
    left.set(xlim=(0.48, 1.02), ylim=(0, 1.15), xlabel="probability of the response the model prefers")
    left.set_title(f"reliability, calibration error {error:.3f}, n = {total}", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="upper center", ncols=3)

    accuracy = [results[name]["accuracy"] for name in names]
    low = [max(0.0, value - results[name]["accuracy_low"]) for name, value in zip(names, accuracy, strict=True)]
    high = [max(0.0, results[name]["accuracy_high"] - value) for name, value in zip(names, accuracy, strict=True)]
    places = range(len(names))[::-1]
    right.errorbar(accuracy, places, xerr=[low, high], fmt="o", color=_POINT, ecolor="0.6", capsize=3, ms=5)
    right.axvline(0.5, color="0.7", lw=1, ls="--")
    right.set_yticks(
        places, [f"{_printable(name)} ({results[name]['n']})" for name in names], fontsize=8, parse_math=False
    )
    right.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(names) - 0.4), xlabel="accuracy, 95 % interval")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)
