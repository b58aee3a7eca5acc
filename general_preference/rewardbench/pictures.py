"""A benchmark's subsets as a bar chart."""

from pathlib import Path

from general_preference.plotting import load_pyplot
from general_preference.rewardbench.data import Benchmark
from general_preference.rewardbench.scoring import SECTIONS, TIES

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")


def draw_subsets(benchmark: Benchmark, results: dict[str, dict], title: str, path: Path) -> bool:
    """One bar per subset with its 95 % interval, colored by section, and what guessing would get; False if not drawn.

    Args:
        results: {subset: statistics}, as `report.summarize` gives them.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    names = list(results)[::-1]
    accuracy = [results[name]["accuracy"] for name in names]
    low = [max(0.0, value - results[name]["accuracy_low"]) for name, value in zip(names, accuracy, strict=True)]
    high = [max(0.0, results[name]["accuracy_high"] - value) for name, value in zip(names, accuracy, strict=True)]
    color = {
        subset: (section, _COLOURS[number])
        for number, (section, subsets) in enumerate(SECTIONS.items())
        for subset in (subsets if not benchmark.best_of_n else ())
    }
    figure, axis = pyplot.subplots(figsize=(8, 1.6 + 0.3 * len(names)), constrained_layout=True)
    labeled: set[str] = set()
    for place, name in list(enumerate(names))[::-1]:
        section, fill = color.get(name, ("", _COLOURS[0]))
        label = section if section not in labeled else ""
        labeled.add(section)
        axis.barh(place, accuracy[place], color=fill, height=0.72, label=label or None)
    axis.errorbar(accuracy, range(len(names)), xerr=[low, high], fmt="none", ecolor="0.25", capsize=2.5, lw=1)
    for place, name in enumerate(names):
        end = accuracy[place] + high[place] + 0.012
        axis.text(end, place, f"{accuracy[place]:.3f}", va="center", fontsize=8)
        if not (benchmark.best_of_n and name == TIES):
            axis.vlines(0.25 if benchmark.best_of_n else 0.5, place - 0.4, place + 0.4, color="0.1", ls=":", lw=1.2)
    axis.set_yticks(range(len(names)), [f"{name} ({results[name]['n']})" for name in names], fontsize=9)
    axis.set(
        xlim=(0, 1.12),
        ylim=(-0.6, len(names) - 0.4),
        xlabel="accuracy, 95 % interval; dotted: guessing" + (" one of four" if benchmark.best_of_n else ""),
    )
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.set_title(title, fontsize=11, parse_math=False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    if len(labeled) > 1:
        figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
