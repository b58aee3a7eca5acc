"""The picture of a run: every set's number for every model with its interval, calibration, and cycles."""

from pathlib import Path

from general_preference.evaluation.sets import SETS
from general_preference.evaluation.tables import Results
from general_preference.files import writing
from general_preference.plots import GROUPS, load_pyplot


def draw_benchmarks(results: Results, path: Path) -> bool:
    """Dots with 95 % intervals, a row per set and a color per model; right of them calibration error and cycles.

    Returns whether it was drawn: without matplotlib one line is logged.
    """
    if (pyplot := load_pyplot()) is None:
        return False
    sets = list(dict.fromkeys(name for found in results.values() for name in found))
    height = 2.2 + len(sets) * max(0.42, 0.17 * len(results))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, height), sharey=True, width_ratios=(5, 3, 3))
    for number, (model, found) in enumerate(results.items()):
        shift = 0.7 * ((number + 0.5) / len(results) - 0.5)
        places = {name: place + shift for place, name in enumerate(sets) if name in found}
        look = {"fmt": "o", "ms": 5, "lw": 1.4, "capsize": 2.5, "color": GROUPS[number % len(GROUPS)]}
        scored = [name for name in places if found[name]["score"] is not None]  # the others lack a subset
        rows = [[found[name][key] for key in ("score", "score_low", "score_high")] for name in scored]
        middle = [row[0] for row in rows]
        spread = [[0.0 if row[end] is None else abs(row[end] - row[0]) for row in rows] for end in (1, 2)]
        axes[0].errorbar(middle, [places[name] for name in scored], xerr=spread, label=model, **look)
        axes[1].plot([found[name]["ece"] for name in places], list(places.values()), "o", ms=5, color=look["color"])
        groups = {name: found[name]["groups"]["cycles"] for name in places if found[name]["groups"]["n"]}
        axes[2].plot(list(groups.values()), [places[name] for name in groups], "o", ms=5, color=look["color"])
    for place, name in enumerate(sets):
        if SETS[name].chance is not None:
            axes[0].vlines(SETS[name].chance, place - 0.4, place + 0.4, color="0.1", ls=":", lw=1.2)
        if not any(found[name]["groups"]["n"] for found in results.values() if name in found):
            axes[2].text(0.5, place, "two responses each", ha="center", va="center", fontsize=8, color="0.5")
        for axis in axes:
            axis.axhline(place + 0.5, color="0.9", lw=0.8, zorder=0)
    counts = {name: numbers["records"] for found in results.values() for name, numbers in found.items()}
    axes[0].set_yticks(range(len(sets)), [f"{SETS[name].title} ({counts[name]})" for name in sets], parse_math=False)
    axes[0].set(
        ylim=(len(sets) - 0.5, -0.5),
        xlim=(-0.03, 1.03),
        xlabel="score, 95 % interval; dotted: guessing, where that is one number",
    )
    axes[1].set_xlim(left=-0.02)
    axes[1].set(xlabel="calibration error (0: as sure as it is right)")
    axes[2].set(xlim=(-0.05, 1.05), xlabel="share of prompts with a preference cycle")
    for axis in axes:
        axis.grid(False, axis="y")
    figure.suptitle("Models on evaluation sets (number of records)", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(results)))
    with writing(path):
        figure.savefig(path)
    pyplot.close(figure)
    return True
