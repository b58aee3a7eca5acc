"""The picture of a comparison of heads: accuracies over seeds, and differences from the first head."""

from pathlib import Path

from general_preference.files import writing
from general_preference.plots import load_pyplot

MAX_SETS = 6
_COLORS = {
    "better": "#2a7f62",
    "worse": "#c0392b",
    "no difference": "#1f3b5c",
    None: "#1f3b5c",
    "too few prompts": "0.6",
}


def draw_heads(results: dict[str, dict], path: Path) -> bool:
    """A row of two panels for each set of what scripts/compare_heads.py writes, at most `MAX_SETS`; False if not drawn.

    results: {set: {"heads": `compare_scores`, "longer_response", "scalar_ceiling", "n", "prompts"}}.
    """
    if (pyplot := load_pyplot()) is None:
        return False
    shown = dict(list(results.items())[:MAX_SETS])
    names = list(next(iter(shown.values()))["heads"])
    height = 1.5 + 0.24 * len(names)
    figure, axes = pyplot.subplots(
        len(shown), 2, figsize=(12, 0.5 + height * len(shown)), squeeze=False, sharey=True, width_ratios=(3, 2)
    )
    for (left, right), (name, found) in zip(axes, shown.items(), strict=True):
        heads, places = found["heads"], range(len(names))
        for place, head in zip(places, heads.values(), strict=True):
            color = _COLORS[head.get("verdict")]
            _draw_interval(left, head["accuracy"], head["accuracy"]["mean"], place, color)
            left.plot(head["accuracy"]["each"], [place] * len(head["accuracy"]["each"]), "|", color=color, alpha=0.5)
            if "difference" in head:
                _draw_interval(right, head["difference"], head["difference"]["difference"], place, color)
        left.axvline(found["longer_response"], color="0.6", lw=1, ls=":", label="the longer response wins")
        if found["scalar_ceiling"] not in (None, 1.0):  # 1 is none
            left.axvline(found["scalar_ceiling"], color="#dd8452", lw=1, ls="--", label="ceiling of one number")
        left.set_title(f"{name}: {found['n']} comparisons of {found['prompts']} prompts", parse_math=False)
        right.axvline(0, color="0.3", lw=1, ls="--", zorder=0)
        right.set_title("green better, red worse, gray too few prompts")
        right.locator_params(axis="x", nbins=5)
        left.set_yticks(places, names, parse_math=False)
        left.set_ylim(len(names) - 0.5, -0.5)
    axes[-1, 0].set_xlabel("accuracy: mean over seeds, its 95 % interval, each seed")
    axes[-1, 1].set_xlabel(f"difference from {names[0]}, 95 % for all heads together", parse_math=False)
    lines = {line.get_label(): line for axis in axes[:, 0] for line in axis.lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2)
    with writing(path):
        figure.savefig(path)
    pyplot.close(figure)
    return True


def _draw_interval(axis, interval: dict, middle: float, place: int, color: str) -> None:
    if interval["low"] is not None:
        axis.plot([interval["low"], interval["high"]], [place, place], "-", color=color, lw=1.6)
    axis.plot(middle, place, "o", color=color, ms=5)
