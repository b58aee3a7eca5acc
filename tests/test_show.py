"""`GPMPipeline.show`: the picture states what the model says; `repr`, and bars that suit a notebook."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import tqdm.auto

from general_preference import GPMPipeline
from general_preference.errors import InputError, RunError
from general_preference.inference import batch, embedding
from general_preference.inference.figures import ALL_ARROWS, LABEL_CHARACTERS
from general_preference.models.config import PreferenceConfig
from general_preference.models.reward_model import get_reward_model
from general_preference.models.score import plane_scores
from general_preference.plots import _RIGHT, _WRONG
from general_preference.trainer import trainer

ROOT = Path(__file__).resolve().parents[1]
PROMPT, RESPONSES = "Which throw wins?", ["The rock.", "Paper, of course.", "scissors äöü", "none", "a b c"]
LABELS = list("ABCDE")
HEADS = [("bt", 1, False), ("gpm", 4, True), ("gpm", 10, True), ("gpm", 10, False), ("hybrid", 3, False)]


@pytest.fixture
def pipeline(saved):
    """A function: (head, dim, gate) -> GPMPipeline."""
    return lambda head="gpm", dim=4, gate=True: GPMPipeline(saved("llama", head, dim, gate), device="cpu")


def planes(figure) -> dict:
    """{number of the plane: its axis}, in the order drawn."""
    titles = {axis: axis.get_title() for axis in figure.axes}
    return {int(title.split()[1]) - 1: axis for axis, title in titles.items() if title.startswith("plane ")}


def arrows(axis) -> list[tuple]:
    """(start, end, color) of every arrow; the lines to the texts are no arrows."""
    found = [note for note in axis.texts if note.get_text() == ""]
    return [(note.xyann, note.xy, note.arrowprops["color"]) for note in found]


@pytest.mark.parametrize(("head", "dim", "gate"), HEADS)
def test_matrix_is_the_preference_matrix(pipeline, head, dim, gate):
    rm = pipeline(head, dim, gate)
    axis = rm.show(PROMPT, RESPONSES, LABELS).axes[0]
    shown = {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axis.texts}
    expected = rm.preference_matrix(PROMPT, RESPONSES).tolist()
    assert shown == {(i, j): f"{expected[i][j]:.2f}" for i in range(5) for j in range(5)}
    for axis_of in (axis.xaxis, axis.yaxis):
        assert [label.get_text() for label in axis_of.get_ticklabels()] == LABELS
    (image,) = axis.images
    assert image.get_array().tolist() == expected
    assert image.cmap(image.norm(0.5))[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.01)  # a tie is white


@pytest.mark.parametrize(("head", "dim", "gate"), HEADS)
def test_panels_hold_the_embeddings(pipeline, head, dim, gate):
    rm = pipeline(head, dim, gate)
    figure = rm.show(PROMPT, RESPONSES, LABELS)
    (found,) = rm.embed([PROMPT], [RESPONSES])
    drawn = planes(figure)
    assert len(drawn) == min(dim // 2, 3) and len(figure.axes) == 1 + len(drawn) + dim % 2
    for plane, axis in drawn.items():
        points = [[line.get_xdata()[0], line.get_ydata()[0]] for line in axis.lines if line.get_marker() == "o"]
        assert points == found.embeddings[:, 2 * plane : 2 * plane + 2].tolist()
        assert [note.get_text() for note in axis.texts if note.get_text()] == LABELS
        assert axis.get_title() == f"plane {plane + 1} of {dim // 2}" + (
            f", gate {found.gate[plane]:.2f}" if gate else ""
        )
    if dim % 2:
        assert [bar.get_width() for bar in figure.axes[-1].patches] == found.embeddings[:, -1].tolist()
        assert figure.axes[-1].get_title() == ("reward" if head == "bt" else "number beside the planes")
        assert figure.axes[-1].get_ylim()[0] > figure.axes[-1].get_ylim()[1]  # in the order of the matrix


@pytest.mark.parametrize("gate", [True, False])
def test_of_many_planes_the_weightiest_are_shown(pipeline, gate):
    rm = pipeline("gpm", 10, gate)
    figure = rm.show(PROMPT, RESPONSES)
    (found,) = rm.embed([PROMPT], [RESPONSES])
    weights = found.gate
    if not gate:
        weights = sum(plane_scores(*found.embeddings[list(pair)]).abs() for pair in combinations(range(5), 2))
    assert list(planes(figure)) == weights.argsort(descending=True)[:3].tolist()
    title = figure.subfigs[1].get_suptitle()
    assert title == f"the 3 of 5 planes with the largest {'gate weights' if gate else 'scores'}"


@pytest.mark.parametrize("count", [2, 3, ALL_ARROWS, ALL_ARROWS + 1])
@pytest.mark.parametrize(("head", "dim", "gate"), [("gpm", 4, True), ("hybrid", 3, False)])
def test_arrows_go_from_the_preferred_response(pipeline, head, dim, gate, count):
    rm = pipeline(head, dim, gate)
    figure = rm.show(PROMPT, RESPONSES[:count])
    (found,) = rm.embed([PROMPT], [RESPONSES[:count]])
    for plane, axis in planes(figure).items():
        places = list(map(tuple, found.embeddings[:, 2 * plane : 2 * plane + 2].tolist()))
        drawn = [(places.index(tuple(start)), places.index(tuple(end)), color) for start, end, color in arrows(axis)]
        pairs = {frozenset(one[:2]) for one in drawn}
        assert len(pairs) == len(drawn) == (count * (count - 1) // 2 if count <= ALL_ARROWS else count)
        for winner, loser, color in drawn:
            assert found.scores()[winner, loser] > 0
            agrees = plane_scores(found.embeddings[winner], found.embeddings[loser])[plane] > 0
            assert color == (_RIGHT if agrees else _WRONG)


def test_ties_have_no_arrow(pipeline):
    figure = pipeline().show(PROMPT, ["same", "same", "other"])
    assert [len(arrows(axis)) for axis in planes(figure).values()] == [2, 2]


def test_labels_are_the_beginnings_of_texts_and_messages(pipeline):
    long = "Costs $\\5 and\n $6, " + "which is long. " * 9
    responses = ["short", long, [{"role": "assistant", "content": "of  messages"}]]
    figure = pipeline().show([{"role": "user", "content": PROMPT}], (one for one in responses))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0: short", "1: Costs $\\5 and $6, which…", "2: of messages"]
    assert max(map(len, labels)) <= LABEL_CHARACTERS
    named = pipeline().show(PROMPT, ["a", "b"], labels=range(2))
    assert [label.get_text() for label in named.axes[0].get_yticklabels()] == ["0", "1"]
    assert figure._repr_png_().startswith(b"\x89PNG")  # the text between dollars is no formula, nor could it be one


def test_path_writes_the_picture(pipeline, tmp_path):
    rm = pipeline("bt", 1, False)
    for name, start in (("deep/er/a.png", b"\x89PNG"), ("b.pdf", b"%PDF")):
        figure = rm.show(PROMPT, RESPONSES, path=tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(RunError, match=r"cannot write .*b\.pdf/c\.png"):
        rm.show(PROMPT, RESPONSES, path=tmp_path / "b.pdf" / "c.png")


@pytest.mark.parametrize(
    ("responses", "options", "message"),
    [
        (RESPONSES[:1], {}, "there is one response, expected at least two"),
        ([], {}, "the responses are an empty list, expected a list of at least two"),
        ("rock", {}, "the responses are 'rock', expected a list of at least two"),
        (RESPONSES, {"labels": ["a"]}, "there are 1 labels, but 5 responses"),
        (RESPONSES, {"labels": "abcde"}, "the labels are 'abcde', expected a list"),
        (RESPONSES, {"path": "picture.doc"}, "path picture.doc ends in no format of pictures"),
        (RESPONSES, {"path": "picture"}, "path picture ends in no format of pictures"),
        (RESPONSES, {"label": LABELS}, "did you mean labels"),
        (["rock", None], {}, "response 1 to prompt 0"),
    ],
)
def test_what_cannot_be_shown_is_named(pipeline, responses, options, message):
    with pytest.raises(InputError, match=message):
        pipeline().show(PROMPT, responses, **options)


def test_without_matplotlib_the_cure_is_named(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        pipeline().show(PROMPT, RESPONSES)


def test_neither_pyplot_nor_a_warning(saved):
    code = (
        "import sys, tqdm, warnings\n"
        "sys.modules['ipywidgets'] = None  # cannot be imported\n"
        "warnings.simplefilter('error', tqdm.TqdmWarning)\n"
        "from general_preference import GPMPipeline\n"
        "figure = GPMPipeline(sys.argv[1], device='cpu').show('q', ['a', 'b'])\n"
        "assert figure._repr_png_().startswith(b'\\x89PNG')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, saved()], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_bars_are_those_of_the_notebook_in_a_notebook():
    assert {module.tqdm for module in (batch, embedding, trainer)} == {tqdm.auto.tqdm}


def test_repr_states_the_model(saved, model_folder, tokenizer):
    folder = saved()
    rm = GPMPipeline(folder, device="cpu", max_length=64)
    size = sum(weight.numel() for weight in rm.model.parameters())
    rest = "GPM D=4 with gate, temperature 0.1, chat, max_length 64, cpu float32"
    assert repr(rm) == f"GPMPipeline('{folder}', {rest}, {size / 1e6:.1f} M parameters)"
    model = get_reward_model(model_folder("llama"), preference=PreferenceConfig("bt", max_length=32))
    expected = "GPMPipeline(Bradley-Terry, temperature 1, chat, max_length 32, cpu bfloat16, 0.0 M parameters)"
    assert repr(GPMPipeline.from_model(model, tokenizer)) == expected
