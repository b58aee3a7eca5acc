"""Pictures of a run: the training curves, and where the members of a held-out cycle lie.

Both go to PNG files in the run's folder.
"""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import networkx
import torch

from general_preference.datasets.packing import Batch
from general_preference.models.score import preference_score
from general_preference.plotting import load_pyplot

MEMBER_CHARACTERS = 90  # of a response beside its point
_RIGHT, _WRONG, _POINT = "#2a7f62", "#c0392b", "#1f3b5c"


@dataclass
class EmbeddedCycle:
    """A held-out cycle as the model sees it.

    set: name of its evaluation set. members: K short texts, each preferred to the next and the last to the first.
    embeddings: (K, D). gate: (P,) or None.
    """

    set: str
    members: list[str]
    embeddings: torch.Tensor
    gate: torch.Tensor | None


def embedded_cycle(name: str, batch: Batch, output: dict[str, torch.Tensor], tokenizer) -> EmbeddedCycle | None:
    """The first comparison of a batch whose stated preferences go round, with the model's output for it; or None."""
    for index in range(len(batch.prompt_ends)):
        mine = batch.comparison_index == index
        if mine.sum() < 3:
            continue
        members = find_cycle(list(zip(batch.first[mine].tolist(), batch.second[mine].tolist(), strict=True)))
        if members is None:
            continue
        texts = [_response_text(batch, end, tokenizer) for end in batch.response_ends[members].tolist()]
        gate = output["gates"][index].float().cpu() if "gates" in output else None
        return EmbeddedCycle(name, texts, output["embeddings"][members].float().cpu(), gate)
    return None


def find_cycle(edges: list[tuple[int, int]]) -> list[int] | None:
    """The longest simple cycle of a small directed graph of (winner, loser) edges; None if there is none.

    Response indices from the smallest on, each preferred to the next and the last to the first. Exponential in the
    number of responses.
    """
    cycle = max(networkx.simple_cycles(networkx.DiGraph(edges)), key=len, default=None)
    return cycle and cycle[(start := cycle.index(min(cycle))) :] + cycle[:start]


def _response_text(batch: Batch, end: int, tokenizer) -> str:
    row, column = divmod(end, batch.input_ids.shape[1])
    same = batch.segments[row, : column + 1] == batch.segments[row, column]
    text = tokenizer.decode(batch.input_ids[row, : column + 1][same], skip_special_tokens=True)
    return textwrap.fill(textwrap.shorten(text, MEMBER_CHARACTERS, placeholder=" …"), 30)


def draw_training_curves(rows: list[dict], path: Path) -> bool:
    """Loss and accuracy over steps, from the rows of metrics.jsonl; False if not drawn."""
    pyplot = load_pyplot()
    if pyplot is None or not rows:
        return False
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    for axis, name in zip(axes, ("loss", "accuracy", "learning_rate"), strict=True):
        for key in dict.fromkeys(key for row in rows for key in row if key.startswith(("train/", "eval/"))):
            family, _, metric = key.rpartition("/")
            if metric != name:
                continue
            points = [(row["step"], row[key]) for row in rows if key in row]
            style = (
                {"lw": 1, "alpha": 0.7, "color": "0.55"} if family == "train" else {"lw": 1.8, "marker": "o", "ms": 4}
            )
            axis.plot(*zip(*points, strict=True), label=family.removeprefix("eval/"), **style)
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.25)
        if name == "accuracy":
            axis.set_ylim(-0.02, 1.04)
        if axis.lines and name != "learning_rate":
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def draw_cycles(cycles: list[EmbeddedCycle], path: Path) -> bool:
    """The members of held-out cycles: around a circle for planes, on a line for one number. False if not drawn.

    An arrow points from the preferred member to the other: green where the model agrees, red where it does not.
    """
    pyplot = load_pyplot()
    if pyplot is None or not cycles:
        return False
    columns = min(2, len(cycles))
    rows = -(-len(cycles) // columns)
    size = (6.2 * columns, 4.2 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    figure.get_layout_engine().set(hspace=0.1)
    for axis in axes.flat[len(cycles) :]:
        axis.axis("off")
    for axis, cycle in zip(axes.flat, cycles, strict=False):
        if cycle.embeddings.shape[-1] == 1:
            _draw_line(axis, cycle)
        else:
            _draw_plane(axis, cycle)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _draw_plane(axis, cycle: EmbeddedCycle) -> None:
    embeddings = cycle.embeddings.float()
    following = embeddings.roll(-1, dims=0)
    planes = embeddings.shape[-1] // 2
    weights = torch.ones(planes) if cycle.gate is None else cycle.gate.float()
    per_plane = [
        preference_score(embeddings[:, 2 * p : 2 * p + 2], following[:, 2 * p : 2 * p + 2]) for p in range(planes)
    ]
    plane = int((weights * torch.stack(per_plane, dim=-1).mean(dim=0)).argmax())
    points = embeddings[:, 2 * plane : 2 * plane + 2]
    radius = max(1.0, points.norm(dim=-1).max().item())
    axis.set(xlim=(-2.3 * radius, 2.3 * radius), ylim=(-1.4 * radius, 1.4 * radius), aspect="equal")
    angles = torch.linspace(0, 2 * math.pi, 200)
    axis.plot(radius * angles.cos(), radius * angles.sin(), color="0.8", lw=1, zorder=0)
    scores = preference_score(embeddings, following, cycle.gate)
    for i in range(len(points)):
        _arrow(axis, points[i].tolist(), points[(i + 1) % len(points)].tolist(), scores[i].item() > 0)
    taken: list[tuple[float, float]] = []
    for point, member in zip(points.tolist(), cycle.members, strict=True):
        length = math.hypot(*point) or 1.0
        place = (1.1 * radius * point[0] / length, 1.16 * radius * point[1] / length)
        while any(math.hypot((place[0] - x) / 3, place[1] - y) < 0.3 * radius for x, y in taken):
            place = (place[0], place[1] - 0.1 * radius)  # below a label that stands there
        taken.append(place)
        side = "center" if abs(point[0]) < 0.4 * length else ("left" if point[0] > 0 else "right")
        axis.plot(*point, "o", color=_POINT, ms=8)
        line = {"arrowstyle": "-", "color": "0.85"} if length < 0.8 * radius else None
        axis.annotate(member, point, place, ha=side, va="center", fontsize=7.5, arrowprops=line)
    weight = f", gate {weights[plane]:.2f}" if cycle.gate is not None else ""
    also = "; arrows count the number, too" if embeddings.shape[-1] % 2 else ""
    axis.set_title(f"{cycle.set}: plane {plane + 1} of {planes}{weight}{also}", fontsize=10)
    axis.axis("off")


def _draw_line(axis, cycle: EmbeddedCycle) -> None:
    rewards = cycle.embeddings.flatten().tolist()
    span = max(rewards) - min(rewards) or 1.0
    axis.set(
        xlim=(min(rewards) - 0.4 * span, max(rewards) + 0.4 * span),
        ylim=(-1.3 * span, 1.3 * span),
        yticks=[],
        xlabel="reward",
    )
    axis.axhline(0, color="0.8", lw=1, zorder=0)
    for i, reward in enumerate(rewards):
        following = rewards[(i + 1) % len(rewards)]
        _arrow(axis, (reward, 0), (following, 0), reward > following, bend=0.45)
        axis.plot(reward, 0, "o", color=_POINT, ms=8)
        height = (0.35 + 0.13 * i) * (-1 if i % 2 else 1) * span
        line = {"arrowstyle": "-", "color": "0.85"}
        axis.annotate(cycle.members[i], (reward, 0), (reward, height), ha="center", fontsize=7.5, arrowprops=line)
    axis.set_title(f"{cycle.set}: one number per response", fontsize=10)
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)


def _arrow(axis, start, end, agrees: bool, bend: float = 0.0) -> None:
    # Between close points a head longer than the gap would point backwards.
    pixels = axis.transData.transform([start, end])
    gap = math.dist(*pixels) * 72 / axis.figure.dpi
    shrink, head = min(7.0, 0.2 * gap), max(3.0, min(13.0, 0.5 * gap))
    style = {"arrowstyle": "-|>", "shrinkA": shrink, "shrinkB": shrink, "lw": 1.4, "mutation_scale": head}
    style |= {"color": _RIGHT if agrees else _WRONG, "connectionstyle": f"arc3,rad={bend}"}
    axis.annotate("", xy=end, xytext=start, arrowprops=style)
