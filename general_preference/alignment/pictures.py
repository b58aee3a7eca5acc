"""The picture of a report: one iteration of alignment at a glance."""

from pathlib import Path

from general_preference.files import writing
from general_preference.plots import load_pyplot

MAX_PLANES = 8
_COLORS = {"model": "#1f3b5c", "judge": "#dd8452"}
_BEFORE, _NOW, _MIXTURE = "#9db4cc", "#1f3b5c", "#2a7f62"


def draw_policies(report: dict, path: Path) -> bool:
    """Six panels of what scripts/compare_policies.py writes: win rates, matrix, exploitability, length, planes, n.

    The judge is in the first and the last; the others are of the preference model. Returns whether it was drawn:
    without matplotlib one line is logged.
    """
    if (pyplot := load_pyplot()) is None:
        return False
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.4))
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    figure.suptitle(f"policy {report['current']}, {report['prompts']} held-out prompts", parse_math=False)
    names, model = list(report["policies"]), report["model"]
    views = {role: report[role] for role in _COLORS if report[role] is not None}
    _draw_win_rates(axes[0, 0], views, names)
    _draw_matrix(axes[0, 1], model, names)
    _draw_exploitability(axes[0, 2], model["exploitability"]["responses"], names)
    _draw_length(axes[1, 0], model)
    _draw_planes(axes[1, 1], model["planes"], names)
    kl = report["kl"] if report["previous"] == names[0] else None  # else it is not from the start
    _draw_best_of_n(axes[1, 2], views, names[-1], kl)
    with writing(path):
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary)
        temporary.replace(path)
    pyplot.close(figure)
    return True


def _spread(rows: list[dict]) -> tuple[list[float], list[list[float]]]:
    """(win rates, distances to the ends of their intervals) as errorbar takes them."""
    rates = [row["win_rate"] for row in rows]
    ends = (
        [rate if row[end] is None else row[end] for row, rate in zip(rows, rates, strict=True)]
        for end in ("low", "high")
    )
    return rates, [[abs(end - rate) for end, rate in zip(side, rates, strict=True)] for side in ends]


def _draw_win_rates(axis, views: dict[str, dict], names: list[str]) -> None:
    for number, (role, view) in enumerate(views.items()):
        places = [place + 0.12 * (number - (len(views) - 1) / 2) for place in range(len(names))]
        rates, spread = _spread(list(view["against_start"].values()))
        axis.errorbar(places, rates, spread, fmt="o-", lw=1.3, ms=5, capsize=3, color=_COLORS[role], label=role)
    axis.axhline(0.5, color="0.5", lw=1, ls="--")
    axis.set_title(f"win rate against {names[0]}, 95 % interval", parse_math=False)
    _name_policies(axis, names)
    _open_top(axis)


def _draw_matrix(axis, view: dict, names: list[str]) -> None:
    axis.imshow(view["matrix"], cmap="RdBu", vmin=-0.2, vmax=1.2)  # the map's ends are too dark to read on
    if len(names) <= 12:
        for row, values in enumerate(view["matrix"]):
            for column, value in enumerate(values):
                color = "white" if abs(value - 0.5) > 0.4 else "0.1"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    labels = [f"{name}\nNash {weight:.2f}" for name, weight in view["nash"].items()]
    axis.set_yticks(range(len(names)), labels, fontsize=8, parse_math=False)
    _name_policies(axis, names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    axis.set_title(f"P(row beats column); cyclic share {view['cyclic_share']:.2f}")


def _draw_exploitability(axis, values: dict, names: list[str]) -> None:
    axis.plot(range(len(names)), list(values["each"].values()), "o-", color=_NOW, lw=1.3, ms=5, label="each policy")
    for key, style, label in (("mixture", "-", "mixture of all"), ("nash", ":", "Nash mixture")):
        axis.axhline(values[key], color=_MIXTURE, lw=1.6, ls=style, label=label)
    axis.set_title("exploitability: P(best sampled response wins) - 1/2")
    _name_policies(axis, names)
    _open_top(axis, 0.5)


def _draw_length(axis, view: dict) -> None:
    length, overall = view["length"], view["win_rate"]["start"]["win_rate"]
    for place, row in enumerate(length["bins"]):
        axis.bar(place, row["win_rate"], 0.75, color=_BEFORE)
        axis.text(place, 0.03, f"{row['win_rate']:.2f}", ha="center", fontsize=8)
    axis.axhline(overall, color=_NOW, lw=1.3, ls="--", label=f"all pairs {overall:.3f}")
    if length["controlled_win_rate"] is not None:
        controlled = length["controlled_win_rate"]
        axis.axhline(controlled, color=_MIXTURE, lw=1.6, label=f"at equal length {controlled:.3f}")
    labels = [f"{row['low']:+d} to {row['high']:+d}\n{row['share']:.0%} of pairs" for row in length["bins"]]
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set(xlabel="tokens more than the start's response", title="win rate against the start by length")
    _open_top(axis)


def _draw_planes(axis, planes: list[dict], names: list[str]) -> None:
    columns = (("start_share", names[0], _BEFORE), ("share", names[-1], _NOW))
    largest = sorted(planes, key=lambda row: -max(row[key] or 0 for key, *_ in columns))[:MAX_PLANES]
    shown = [row for row in planes if row in largest]
    for number, (key, label, color) in enumerate(columns):
        places = [place + 0.4 * (number - 0.5) for place in range(len(shown))]
        axis.bar(places, [row[key] or 0 for row in shown], 0.38, color=color, label=label)
    labels = [f"{row['name']}\n{row['contribution']:+.2f}" for row in shown]
    axis.set_xticks(range(len(shown)), labels, fontsize=8)
    left_out = f", {MAX_PLANES} largest of {len(planes)}" if len(shown) < len(planes) else ""
    axis.set_title(f"share of the squared scores among own samples{left_out}")
    axis.set_xlabel("signed: what it adds to the current policy's logit over the start")
    _open_top(axis)


def _draw_best_of_n(axis, views: dict[str, dict], current: str, kl: float | None) -> None:
    for role, view in views.items():
        rows, now, color = view["best_of_n"], view["win_rate"]["start"], _COLORS[role]
        rates, spread = _spread(rows)
        bounds = [row["kl_bound"] for row in rows]
        axis.errorbar(bounds, rates, spread, fmt="o-", lw=1.3, ms=5, capsize=3, color=color, label=f"best of n, {role}")
        if kl is None:
            axis.axhline(now["win_rate"], color=color, lw=1.3, ls="--", label=f"policy {current}, {role}")
        else:
            middle, ends = _spread([now])
            axis.errorbar([kl], middle, ends, fmt="D", ms=7, capsize=3, color=color, label=f"policy {current}, {role}")
        if role == "model":
            for row, bound, rate in zip(rows, bounds, rates, strict=True):
                place = {"xytext": (0, -24), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"n = {row['n']}", (bound, rate), fontsize=8, **place)
    axis.margins(x=0.08)
    axis.set_title("win rate against the start, beside its best of n")
    axis.set_xlabel("KL divergence from the start (of best of n: its bound), nats")
    _open_top(axis)


def _name_policies(axis, names: list[str]) -> None:
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, names)) > 40 else {}
    axis.set_xticks(range(len(names)), names, fontsize=8, parse_math=False, **turned)


def _open_top(axis, highest: float = 1.0) -> None:
    """From 0 to `highest`, with room for the legend above it."""
    axis.set_ylim(0, 1.22 * highest)
    axis.set_yticks([step * highest / 5 for step in range(6)])
    axis.grid(False, axis="x")
    axis.legend(loc="upper center", ncols=3 if highest < 1 else 2)
