"""The picture of `GPMPipeline.show`: who is preferred to whom, and why, for K responses to one prompt.

On the left the preference matrix; on the right what the head makes it of: planes, numbers, or both.
"""

import math
import os
import textwrap
from pathlib import Path

import torch

from general_preference.datasets.messages import parse_messages
from general_preference.errors import InputError
from general_preference.files import writing
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.models.score import plane_scores, preference_probability
from general_preference.plots import mark_point, mark_preference, open_figure, open_plane

MAX_PLANES, LABEL_CHARACTERS = 3, 28  # in one picture; of a label
ALL_ARROWS = 4  # responses with an arrow for each pair; among more, for neighbors around the circle
_ARROWS = "point from the preferred response to the other,\ngreen where the plane agrees, red where it is outvoted"


def default_labels(responses: list) -> list[str]:
    """Index and beginning of each response (text, or messages, of which it is the last)."""
    texts = [one if isinstance(one, str) else parse_messages(one, "response")[-1]["content"] for one in responses]
    return [f"{index}: {text}" for index, text in enumerate(texts)]


def draw_preferences(embedded: EmbeddedPrompt, temperature: float, labels: list):
    """A matplotlib Figure of K >= 2 responses with one label each."""
    labels, count, dim = list(map(_shortened, labels)), len(labels), embedded.embeddings.shape[1]
    shown = _planes(embedded)
    panels = len(shown) + dim % 2
    side, panel = max(3.2, 0.5 * count), max(2.7, 1.2 + 0.22 * count)  # inches: of the matrix, height of a panel
    figure = open_figure(side + 2.4 + 1.8 * panel, max(side + 1.7, panels * panel + 0.3))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # room for slanted labels, which the default cuts
    left, right = figure.subfigures(1, 2, width_ratios=[side + 2.4, 1.8 * panel])
    _draw_matrix(left.subplots(), preference_probability(embedded.scores(), temperature), labels)
    axes = [part.subplots() for part in right.subfigures(panels, squeeze=False)[:, 0]]
    if shown:
        radius = embedded.embeddings[:, : dim - dim % 2].unflatten(1, (-1, 2))[:, shown].norm(dim=-1).max().item()
        for axis, plane in zip(axes, shown, strict=False):
            _draw_plane(axis, embedded, plane, radius or 1.0, labels)
        right.supxlabel(f"Arrows{' between neighbors' * (count > ALL_ARROWS)} {_ARROWS}", fontsize=8)
    if dim // 2 > MAX_PLANES:
        chosen = "scores" if embedded.gate is None else "gate weights"
        right.suptitle(f"the {MAX_PLANES} of {dim // 2} planes with the largest {chosen}", fontsize=10)
    if dim % 2:
        title = "reward" if dim == 1 else "number beside the planes"
        _draw_numbers(axes[-1], embedded.embeddings[:, -1].tolist(), labels, title)
    return figure


def save_figure(figure, path: str | os.PathLike) -> None:
    """Write a figure in the format that the ending of `path` names, into a folder that is made if need be.

    Raises:
        InputError: matplotlib has no such format. RunError: the file cannot be written.
    """
    path, formats = Path(path).expanduser(), figure.canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise InputError(f"path {path} ends in no format of pictures: choose .png, .pdf, .svg or another of matplotlib")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _shortened(label: object) -> str:
    text = " ".join(str(label).split())
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1].rstrip() + "…"


def _planes(embedded: EmbeddedPrompt) -> list[int]:
    """Indices of the planes that are drawn: the largest gate weights or, without a gate, the largest scores."""
    first, second = embedded.embeddings[:, None], embedded.embeddings[None]
    weights = plane_scores(first, second).abs().mean(dim=(0, 1)) if embedded.gate is None else embedded.gate
    return weights.argsort(descending=True, stable=True)[:MAX_PLANES].tolist()


def _draw_matrix(axis, probabilities: torch.Tensor, labels: list[str]) -> None:
    axis.imshow(probabilities, cmap="RdBu", vmin=-0.2, vmax=1.2)  # the map's ends are too dark to read on
    for row, values in enumerate(probabilities.tolist()):
        for column, value in enumerate(values):
            color = "white" if abs(value - 0.5) > 0.4 else "0.1"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    places = range(len(labels))
    axis.set_yticks(places, labels, fontsize=8, parse_math=False)
    rotated = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(places, labels, fontsize=8, parse_math=False, **rotated)
    axis.set_anchor("N")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    axis.set_title("P(row is preferred to column)", fontsize=10)


def _draw_plane(axis, embedded: EmbeddedPrompt, plane: int, radius: float, labels: list[str]) -> None:
    embeddings, scores = embedded.embeddings, embedded.scores()
    points, planes, count = embeddings[:, 2 * plane : 2 * plane + 2], embeddings.shape[1] // 2, len(labels)
    places = open_plane(axis, points, radius)
    for point, place, label in zip(points.tolist(), places, labels, strict=True):
        mark_point(axis, point, place, textwrap.fill(label, 18), min(0.4, math.tan(math.pi / count)))
    around = torch.atan2(points[:, 1], points[:, 0]).argsort().tolist()
    pairs = zip(around, around[1:] + around[:1], strict=True)
    if count <= ALL_ARROWS:
        pairs = torch.combinations(torch.arange(count)).tolist()
    for one, other in pairs:
        winner, loser = (one, other) if scores[one, other] > 0 else (other, one)
        if scores[winner, loser] > 0:  # not a tie
            agrees = plane_scores(embeddings[winner], embeddings[loser])[plane] > 0
            mark_preference(axis, points[winner].tolist(), points[loser].tolist(), bool(agrees))
    weight = "" if embedded.gate is None else f", gate {embedded.gate[plane]:.2f}"
    axis.set_title(f"plane {plane + 1} of {planes}{weight}", fontsize=10)


def _draw_numbers(axis, numbers: list[float], labels: list[str], title: str) -> None:
    bars = axis.barh(range(len(labels)), numbers, color="#9db4cc", height=0.7)
    axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
    axis.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.axvline(0, color="0.5", lw=0.8)
    axis.margins(x=0.2)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(False)
    axis.set_title(title, fontsize=10)
