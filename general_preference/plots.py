"""Pictures of runs and models: training curves, held-out cycles, reliability, benchmark subsets, models side by side.

Each `draw_` function writes one PNG and returns whether it did: without matplotlib it logs one line and draws nothing.
`inference/figures.py` draws for notebooks with what this file gives it: a figure, points, arrows and circles.
"""

import functools
import io
import logging
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from general_preference.errors import InputError
from general_preference.files import writing
from general_preference.models.score import preference_score, simple_cycles
from general_preference.models.statistics import wilson_interval

logger = logging.getLogger(__name__)

MEMBER_CHARACTERS, MAX_SUBSETS = 90, 40  # of a response beside its point; in one picture
_POINT, _BAR, _RIGHT, _WRONG = "#1f3b5c", "#9db4cc", "#2a7f62", "#c0392b"
GROUPS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
_TRAIN, _EVALUATION = {"lw": 1, "alpha": 0.7, "color": "0.55"}, {"lw": 1.8, "marker": "o", "ms": 4}
_STYLE = {"figure.constrained_layout.use": True, "savefig.dpi": 130, "axes.titlesize": 10, "axes.grid": True}
_STYLE |= {
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
}


def load_pyplot():
    """`matplotlib.pyplot` drawing into files, or None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("matplotlib is not installed: pictures are left out (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(_STYLE)
    from matplotlib import pyplot

    return pyplot


def open_figure(width: float, height: float):
    """A matplotlib Figure of that many inches outside pyplot: a notebook shows it once, as the value of its cell.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a picture needs matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    figure._repr_png_ = functools.partial(_png, figure)  # IPython knows Figures only once pyplot has been imported
    return figure


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _save(pyplot, figure, path: Path) -> bool:
    with writing(path):
        figure.savefig(path)
    pyplot.close(figure)
    return True


def draw_training_curves(rows: list[dict], path: Path) -> bool:
    """Loss, accuracy and learning rate over steps, from the rows of metrics.jsonl."""
    if not rows or (pyplot := load_pyplot()) is None:
        return False
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2))
    for axis, name in zip(axes, ("loss", "accuracy", "learning_rate"), strict=True):
        for key in dict.fromkeys(key for row in rows for key in row if key.endswith(f"/{name}")):
            steps, values = zip(*((row["step"], row[key]) for row in rows if key in row), strict=True)
            label = key.removeprefix("eval/").removesuffix(f"/{name}")
            axis.plot(steps, values, label=label, **(_TRAIN if label == "train" else _EVALUATION))
        axis.set(title=name.replace("_", " "), xlabel="step")
        if axis.lines and name != "learning_rate":
            axis.legend()
    axes[1].set_ylim(-0.02, 1.04)
    return _save(pyplot, figure, path)


@dataclass
class EmbeddedCycle:
    """A cycle of K texts, each preferred to the next, the last to the first. embeddings: (K, D). gate: (P,) or None."""

    set: str
    members: list[str]
    embeddings: torch.Tensor
    gate: torch.Tensor | None


def find_cycle(edges: list[tuple[int, int]]) -> list[int] | None:
    """The longest simple cycle among (winner, loser) pairs, starting at its smallest index; None if there is none."""
    return min(simple_cycles(edges), key=lambda one: (-len(one), one), default=None)


def embedded_cycle(name: str, batch, output: dict[str, torch.Tensor], tokenizer) -> EmbeddedCycle | None:
    """The first cycle of stated preferences in a `Batch`, with the model's output for it; None if there is none."""
    for index in range(len(batch.prompt_ends)):
        mine = batch.comparison_index == index
        edges = list(zip(batch.first[mine].tolist(), batch.second[mine].tolist(), strict=True))
        members = find_cycle(edges)
        if members is not None and len(members) > 2:
            texts = []
            for end in batch.response_ends[members].tolist():
                row, column = divmod(end, batch.input_ids.shape[1])
                segments = batch.segments[row, : column + 1]
                start = (
                    int((segments != segments[-1]).nonzero()[-1]) + 1
                )  # a packed row counts from 1 in each comparison
                text = tokenizer.decode(batch.input_ids[row, start : column + 1], skip_special_tokens=True)
                texts.append(textwrap.fill(textwrap.shorten(text, MEMBER_CHARACTERS, placeholder=" …"), 30))
            gate = output["gates"][index].float().cpu() if "gates" in output else None
            return EmbeddedCycle(name, texts, output["embeddings"][members].float().cpu(), gate)
    return None


def draw_cycles(cycles: list[EmbeddedCycle], path: Path) -> bool:
    """Members of cycles on a plane or a line; arrows to the less preferred, green where the model agrees, else red."""
    if not cycles or (pyplot := load_pyplot()) is None:
        return False
    columns, rows = min(2, len(cycles)), math.ceil(len(cycles) / 2)
    figure = pyplot.figure(figsize=(6.2 * columns, 4.2 * rows))
    figure.get_layout_engine().set(hspace=0.1)
    for number, cycle in enumerate(cycles, 1):
        axis = figure.add_subplot(rows, columns, number)
        axis.grid(False)
        points, places, bend = (_on_line if cycle.embeddings.shape[-1] == 1 else _on_plane)(axis, cycle)
        agrees = preference_score(cycle.embeddings, cycle.embeddings.roll(-1, dims=0), cycle.gate) > 0
        for i, (point, place) in enumerate(zip(points, places, strict=True)):
            mark_point(axis, point, place, cycle.members[i], math.inf if bend else 0.4)
            mark_preference(axis, point, points[(i + 1) % len(points)], bool(agrees[i]), bend)
    return _save(pyplot, figure, path)


def mark_preference(axis, winner, loser, agrees: bool, bend: float = 0.0) -> None:
    """An arrow between two points (x, y), green or red; `bend` is the curve's, as a share of its length."""
    arrow = {"color": _RIGHT if agrees else _WRONG, "connectionstyle": f"arc3,rad={bend}"}
    arrow |= {"arrowstyle": "-|>", "lw": 1.4, "mutation_scale": 11, "shrinkA": 5, "shrinkB": 5}
    axis.annotate("", loser, winner, arrowprops=arrow)


def mark_point(axis, point, place, text: str, steep: float) -> None:
    """A dot, joined by a line to a text beside `place` (x, y), or centered above or below it if |x| < steep * |y|."""
    axis.plot(*point, "o", color=_POINT, ms=8, zorder=4)
    x, y = place
    centered = abs(x) < steep * abs(y)
    side = "center" if centered else "left" if x > 0 else "right"
    end = {"ha": side, "va": "center" if not centered else "bottom" if y > 0 else "top"}
    line = {"arrowstyle": "-", "color": "0.85", "shrinkA": 0}
    axis.annotate(text, point, place, **end, fontsize=7.5, arrowprops=line, parse_math=False)


def open_plane(axis, points: torch.Tensor, radius: float) -> list[list[float]]:
    """Prepare an axis for points (K, 2) in a circle; returns places for their texts, in equal steps around it.

    The steps are turned toward the points, and no text covers another.
    """
    axis.set(xlim=(-2.6 * radius, 2.6 * radius), ylim=(-1.6 * radius, 1.6 * radius), aspect="equal")
    circle = torch.linspace(0, 2 * math.pi, 200)
    axis.plot(radius * circle.cos(), radius * circle.sin(), color="0.8", lw=1, zorder=0)
    axis.axis("off")
    angles = torch.atan2(points[:, 1], points[:, 0])
    steps = angles.argsort().argsort() * (2 * math.pi / len(points))
    turn = torch.atan2((angles - steps).sin().sum(), (angles - steps).cos().sum())
    return (1.2 * radius * torch.stack([(steps + turn).cos(), (steps + turn).sin()], dim=1)).tolist()


def _on_plane(axis, cycle: EmbeddedCycle) -> tuple[list, list, float]:
    """(points, places of their texts, bend of the arrows) on the plane that agrees most with the cycle."""
    planes = cycle.embeddings.shape[-1] // 2
    weights = torch.ones(planes) if cycle.gate is None else cycle.gate
    pairs = cycle.embeddings[:, : 2 * planes].unflatten(1, (planes, 2))
    plane = int((weights * preference_score(pairs, pairs.roll(-1, dims=0)).mean(dim=0)).argmax())
    points = pairs[:, plane]
    places = open_plane(axis, points, max(1.0, points.norm(dim=-1).max().item()))
    weight = f", gate {weights[plane]:.2f}" if cycle.gate is not None else ""
    also = "; arrows count the number, too" if cycle.embeddings.shape[-1] % 2 else ""
    axis.set_title(f"{cycle.set}: plane {plane + 1} of {planes}{weight}{also}")
    return points.tolist(), places, 0.0


def _on_line(axis, cycle: EmbeddedCycle) -> tuple[list, list, float]:
    """As `_on_plane`, for a model with one number per response."""
    rewards = cycle.embeddings.flatten()
    span = (rewards.max() - rewards.min()).item() or 1.0
    low, high = rewards.min().item() - 0.4 * span, rewards.max().item() + 0.4 * span
    axis.set(xlim=(low, high), ylim=(-1.3, 1.3), yticks=[], xlabel="reward")
    axis.axhline(0, color="0.8", lw=1, zorder=0)
    axis.set_title(f"{cycle.set}: one number per response")
    axis.spines[["left", "right", "top"]].set_visible(False)
    # Texts in equal steps and in the order of the rewards, above and below by turns, so that none covers another.
    order = rewards.argsort().argsort().tolist()
    places = [(low + (i + 0.5) / len(order) * (high - low), -0.75 if i % 2 else 0.75) for i in order]
    return [(reward, 0.0) for reward in rewards.tolist()], places, 0.45


def draw_reliability(
    bins: list[tuple[float, float, int]], results: dict[str, dict], path: Path, guess: dict[str, float] | None = None
) -> bool:
    """Reliability diagram of `statistics.calibration_bins`, and accuracy per subset with 95 % intervals.

    results: {subset: statistics}, all rows last; of more than `MAX_SUBSETS` only the first and the last are drawn.
    guess: {subset: accuracy of guessing}, drawn dotted; None for 0.5 in all.
    """
    if (pyplot := load_pyplot()) is None:
        return False
    *subsets, last = results
    shown = {name: results[name] for name in [*subsets[:MAX_SUBSETS], last]}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, max(4.4, 1.2 + 0.28 * len(shown))))
    confidence, outcome, counts = zip(*bins, strict=True)
    left.bar(confidence, [n / sum(counts) for n in counts], width=0.028, color=_BAR, label="share of preferences")
    left.plot([0.5, 1], [0.5, 1], color="0.6", lw=1, ls="--", label="calibrated")
    left.vlines(confidence, *zip(*map(wilson_interval, outcome, counts), strict=True), color="0.6", lw=1)
    left.plot(confidence, outcome, "o-", color=_POINT, ms=5, lw=1.2, label="observed share")
    left.set(xlim=(0.48, 1.02), ylim=(0, 1.15), xlabel="probability of the response the model prefers")
    left.set_title(f"reliability, calibration error {results[last]['calibration_error']:.3f}, n = {sum(counts)}")
    left.legend(loc="upper center", ncols=3)
    _draw_accuracies(right, shown, {}, dict.fromkeys(shown, 0.5) if guess is None else guess)
    return _save(pyplot, figure, path)


def draw_subsets(results: dict[str, dict], groups: dict[str, str], guess: dict[str, float], title: str, path: Path):
    """One bar per subset, {accuracy, accuracy_low, accuracy_high, n}, colored by group; dotted: accuracy `guess`."""
    if (pyplot := load_pyplot()) is None:
        return False
    figure, axis = pyplot.subplots(figsize=(8, 1.6 + 0.3 * len(results)))
    _draw_accuracies(axis, results, groups, guess)
    axis.set_title(title, fontsize=11, parse_math=False)
    if any(name in groups for name in results):
        figure.legend(loc="outside lower center", ncols=4)
    return _save(pyplot, figure, path)


def _draw_accuracies(axis, results: dict[str, dict], groups: dict[str, str], guess: dict[str, float]) -> None:
    places = dict(zip(results, range(len(results))[::-1], strict=True))
    for group, color in zip(dict.fromkeys(groups.get(name, "") for name in results), GROUPS, strict=False):
        bars = {places[name]: row["accuracy"] for name, row in results.items() if groups.get(name, "") == group}
        axis.barh(list(bars), list(bars.values()), color=color, height=0.72, label=group)
    for name, place in places.items():
        accuracy, low, high = (results[name][key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
        axis.plot([low, high], [place, place], "|-", color="0.25", lw=1, ms=6)
        axis.text(max(accuracy, high) + 0.015, place, f"{accuracy:.3f}", va="center", fontsize=8)
        axis.vlines(guess.get(name, []), place - 0.4, place + 0.4, color="0.1", ls=":", lw=1.2)
    axis.set_yticks(list(places.values()), [f"{name} ({results[name]['n']})" for name in places], parse_math=False)
    axis.set(xlim=(0, 1.12), ylim=(-0.6, len(places) - 0.4), xlabel="accuracy, 95 % interval; dotted: guessing")
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.grid(False, axis="y")


def draw_runs(runs: list[tuple[str, dict[str, dict]]], path: Path) -> bool:
    """Held-out accuracies of (name, {set: {mean, low, high}}) as bars, a group per set; low and high may be None."""
    if (pyplot := load_pyplot()) is None:
        return False
    sets = list(dict.fromkeys(name for _, accuracies in runs for name in accuracies))
    figure, axis = pyplot.subplots(figsize=(2.2 + 2.4 * len(sets), 4.2))
    width = 0.8 / len(runs)
    for number, (name, accuracies) in enumerate(runs):
        places = [index + (number - (len(runs) - 1) / 2) * width for index in range(len(sets))]
        found = [accuracies.get(key, {"mean": 0, "low": None}) for key in sets]
        spread = [float("nan") if one["low"] is None else one["high"] - one["mean"] for one in found]
        bars = axis.bar(places, [one["mean"] for one in found], 0.92 * width, yerr=spread, label=name, ecolor="0.25")
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axis.set(ylim=(0, 1.22), ylabel="held-out accuracy")
    axis.set_xticks(range(len(sets)), sets)
    axis.grid(False)
    axis.axhline(1, color="0.8", lw=0.8, zorder=0)
    axis.legend(ncols=len(runs), loc="upper center")
    return _save(pyplot, figure, path)


def draw_comparison(compared: dict, path: Path) -> bool:
    """Accuracies of models and their differences from the first, of `compare_models`, as dots with 95 % intervals.

    A row per subset, all rows last; of more than `MAX_SUBSETS` only the first and the last are drawn.
    """
    if (pyplot := load_pyplot()) is None:
        return False
    models, against, baseline = (compared[key] for key in ("models", "against_baseline", "baseline"))
    *subsets, last = models[baseline]["results"]
    shown = [*subsets[:MAX_SUBSETS], last] if len(subsets) > 1 else [last]
    height = max(3, 1.7 + len(shown) * max(0.34, 0.17 * len(models)))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), sharey=True, width_ratios=(3, 2))
    accuracies = [(left, label, ("accuracy", "accuracy_low", "accuracy_high"), models[label]) for label in models]
    differences = [(right, label, ("difference", "low", "high"), against[label]) for label in against]
    for axis, label, keys, found in accuracies + differences:
        number = list(models).index(label)
        places = [place + 0.7 * ((number + 0.5) / len(models) - 0.5) for place in range(len(shown))]
        rows = [[found["results"][name][key] for key in keys] for name in shown]
        middle, *ends = zip(*([row[0] if value is None else value for value in row] for row in rows), strict=True)
        spread = [[abs(end - value) for end, value in zip(side, middle, strict=True)] for side in ends]
        look = {"fmt": "o", "ms": 5, "lw": 1.4, "capsize": 2.5, "color": GROUPS[number % len(GROUPS)]}
        axis.errorbar(middle, places, xerr=spread, label=label, **look)
    counts = [models[baseline]["results"][name]["n"] for name in shown]
    names = [f"{name} ({n})" for name, n in zip(shown, counts, strict=True)]
    left.set_yticks(range(len(shown)), names, parse_math=False)
    left.set(ylim=(len(shown) - 0.5, -0.5), xlabel="accuracy, 95 % interval")
    right.set_xlabel(f"difference of accuracies from {baseline}, 95 % interval", parse_math=False)
    right.axvline(0, color="0.3", lw=1, ls="--", zorder=1)
    right.locator_params(axis="x", nbins=6)
    for axis in (left, right):
        axis.grid(False, axis="y")
        for edge in range(1, len(shown)):
            axis.axhline(edge - 0.5, color="0.9", lw=0.8, zorder=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(models)))
    return _save(pyplot, figure, path)
