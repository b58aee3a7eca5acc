"""Models compared on result files: numbers worked by hand, every layout from its own writer, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval import batch_inference_rm_general_preference as batch_inference
from eval.compare_models import main
from general_preference.inference.comparison import paired_difference, rank_correlation
from general_preference.models.statistics import preference_credit, wilson_interval
from rewardbench_eval import run_rm_rewardbench
from tests.test_rewardbench import best_of_n, pairs, write

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("own_environment")

MODELS = {"gpm": ("llama", "gpm", 4, True), "bt": ("llama", "bt", 1, False)}


def pair(number: int, score: float, subset: str = "", label: float = 1.0) -> dict:
    row = {"id": f"c{number}"} | ({"subset": subset} if subset else {})
    return row | {"score": score, "probability": torch.tensor(score).sigmoid().item(), "label": label}


def group(number: int, *scores: float) -> dict:
    row = {"id": f"g{number}", "score": list(scores), "probability": torch.tensor(scores).sigmoid().tolist()}
    return row | {"preferences": [[0, k + 1, 1.0] for k in range(len(scores))], "cyclic_share": 0.0}


def compare(folder: Path, *files: list[dict], flags=()) -> dict:
    """What the script writes about these rows; a.jsonl is the first file."""
    paths = [str(write(folder / f"{name}.jsonl", rows)) for name, rows in zip("abcd", files, strict=False)]
    assert main([*paths, "--output", str(folder / "out.json"), *flags]) == 0
    return json.loads((folder / "out.json").read_text())


def test_a_pair_of_models_by_hand(tmp_path, capsys):
    """Ten pairs: b is right on five and ties on one that a has wrong, and is wrong on one that a has right."""
    first = [1, 1, 1, -1, -1, -1, -1, -1, -1, 2]
    other = [2, 1, -3, 1, 2, 3, 4, 1, 0, 1]
    subsets = ["x"] * 4 + ["y"] * 6
    a, b = ([pair(i, s, subsets[i]) for i, s in enumerate(scores)] for scores in (first, other))
    found = compare(tmp_path, a, b)
    results = {label: model["results"] for label, model in found["models"].items()}
    assert list(results["a"]) == ["x", "y", "all"] and results["b"]["all"]["ties"] == 1
    assert results["a"]["all"]["accuracy"] == pytest.approx(0.4)
    assert results["b"]["all"]["accuracy"] == pytest.approx((8 + 0.5) / 10), "a tie counts one half, as in the summary"
    interval = results["b"]["all"]["accuracy_low"], results["b"]["all"]["accuracy_high"]
    assert interval == pytest.approx(wilson_interval(0.85, 10))
    whole = found["against_baseline"]["b"]["results"]["all"]
    assert whole["difference"] == pytest.approx(0.45) and (whole["better"], whole["worse"]) == (6, 1)
    assert whole["p_value"] == pytest.approx(2 * (1 + 7) / 2**7), "both tails of B(7, 1/2)"
    assert whole["agreement"] == 0.3
    part = found["against_baseline"]["b"]["results"]["x"]
    assert part["difference"] == 0 and part["p_value"] == 1 and part["n"] == 4 and part["agreement"] == 0.5
    assert found["agreement"] == {"a": {"a": 1, "b": 0.3}, "b": {"a": 0.3, "b": 1}}
    assert (found["rows"], found["comparisons"], found["resamples"]) == (10, 10, 10_000)
    printed = capsys.readouterr().out
    assert "+0.4500" in printed and f"0.850 ({interval[0]:.3f}-" in printed and "0.12" in printed
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_most_different_comparisons_are_those_decided_otherwise(tmp_path, capsys):
    a = [pair(0, 5), pair(1, 1), pair(2, -2), pair(3, 0.1), pair(4, 3, label=0.2)]
    b = [pair(0, 0.1), pair(1, -1), pair(2, 4), pair(3, -0.1), pair(4, -2.5, label=0.2)]
    listed = compare(tmp_path, a, b, flags=["--top", "3"])["against_baseline"]["b"]["most_different"]
    assert [row["id"] for row in listed] == ["c4", "c2", "c1"] and listed[0]["row"] == 5
    turned = {"a": 1 - a[4]["probability"], "b": 1 - b[4]["probability"]}
    assert listed[0]["probability"] == pytest.approx(turned), "of the response that is preferred, here the second"
    assert "P of a" in capsys.readouterr().out


def test_spearman_by_hand():
    one, other = (torch.tensor(values, dtype=torch.float64) for values in ([1, 2, 3, 4], [20, 10, 40, 30]))
    assert rank_correlation(one, other) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert rank_correlation(one, torch.ones(4).double()) == "constant" == rank_correlation(one[:1], other[:1])


def test_credit_is_that_of_the_packages_accuracy():
    score, label = torch.tensor([1, 1, -1, 0, 2.0]).double(), torch.tensor([1, 0.2, 0.2, 1, 0.5]).double()
    assert preference_credit(score, label).tolist() == [1, 0, 1, 0.5, 0.5]


def test_the_bootstrap_interval_is_the_normal_one_of_many_pairs():
    first = torch.tensor([0.0] * 60 + [1.0] * 40 + [1.0] * 300).double()
    other = torch.tensor([1.0] * 60 + [0.0] * 40 + [1.0] * 300).double()
    found = paired_difference(first, other, torch.arange(400))
    deviation = ((100 / 400 - 0.05**2) / 400) ** 0.5
    assert found["difference"] == pytest.approx(0.05)
    assert (found["low"], found["high"]) == pytest.approx((0.05 - 1.96 * deviation, 0.05 + 1.96 * deviation), abs=3e-3)
    assert found == paired_difference(first, other, torch.arange(400)), "the seed is fixed"
    copies = paired_difference(first.repeat(4), other.repeat(4), torch.arange(400).repeat(4))
    assert copies["low"] == pytest.approx(found["low"]), "copies in the same cluster say nothing new"
    apart = paired_difference(first.repeat(4), other.repeat(4), torch.arange(1600))
    assert apart["high"] - apart["low"] == pytest.approx((found["high"] - found["low"]) / 2, rel=0.1)
    alone = paired_difference(first, other, torch.zeros(400).long())
    assert alone["low"] is None and alone["difference"] == found["difference"]


def test_clusters_of_unequal_size_are_weighted_by_their_comparisons():
    """Clusters with gains (1) and (0, 0, 0): draws of two have means 1, 1/4 or 0 with probability 1/4, 1/2, 1/4."""
    found = paired_difference(
        torch.zeros(4).double(), torch.tensor([1.0, 0, 0, 0]).double(), torch.tensor([7, 2, 2, 2])
    )
    assert (found["difference"], found["low"], found["high"]) == (0.25, 0, 1)


def test_groups_stay_whole(tmp_path, capsys):
    a = [group(0, 1, 1, 1), group(1, -1, -1, -1), pair(2, 1)]
    b = [group(0, 1, -1, 1), group(1, 1, 1, 2), pair(2, 1)]
    found = compare(tmp_path, a, b)
    assert (found["rows"], found["comparisons"]) == (3, 7)
    row = found["against_baseline"]["b"]["results"]["all"]
    assert row["difference"] == pytest.approx(2 / 7) and (row["better"], row["worse"], row["agreement"]) == (
        3,
        1,
        3 / 7,
    )
    assert (row["low"], row["high"]) == pytest.approx((-1 / 3, 1)), "three times the first, three times the second"
    listed = found["against_baseline"]["b"]["most_different"]
    assert (listed[0]["id"], listed[0]["preferred"], listed[0]["other"]) == ("g1", 0, 3)
    assert "keep groups whole" in capsys.readouterr().out


def results(folder: Path, model: str, name: str, data: Path, *flags) -> Path:
    """A result file of the benchmark, named `name`, from its own script."""
    asked = ["--model", model, "--dataset", str(data), "--output_dir", str(folder), "--model_name", name, *flags]
    assert run_rm_rewardbench.main(asked) == 0
    ending = ".v2" if "2" in flags else ".pref_sets" if "--pref_sets" in flags else ""
    return folder / f"{name}{ending}.jsonl"


@pytest.mark.parametrize("kind", ["batch", "version 1", "version 2", "prior sets"])
def test_files_of_every_writer(saved, tmp_path, kind, capsys):
    paths, summaries = [], []
    for name, key in MODELS.items():
        if kind == "batch":
            paths.append(tmp_path / f"{name}.jsonl")
            data = f"{write(tmp_path / 'mine.jsonl', pairs(1))},{ROOT / 'data/mixed/test.jsonl'}"
            flags = ["--max_samples", "60", "--save_embeddings", "--output_path", str(paths[-1]), "--dataset", data]
            assert batch_inference.main(["--pretrain", saved(*key), *flags]) == 0
        elif kind == "version 1":
            paths.append(results(tmp_path, saved(*key), name, write(tmp_path / "rows.jsonl", pairs())))
        elif kind == "version 2":
            data = write(tmp_path / "rows.parquet", best_of_n())
            paths.append(results(tmp_path, saved(*key), name, data, "--rewardbench_version", "2"))
        else:
            rows = [row | {"subset": "shp", "prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs(1)]
            paths.append(results(tmp_path, saved(*key), name, write(tmp_path / "rows.jsonl", rows), "--pref_sets"))
        summaries.append(json.loads(paths[-1].with_name(paths[-1].stem + ".summary.json").read_text()))
    capsys.readouterr()
    assert main([*map(str, paths), "--output", str(tmp_path / "compared.json")]) == 0
    found = json.loads((tmp_path / "compared.json").read_text())
    assert list(found["models"]) == [path.stem for path in paths], "both folders are called model: files name them"
    for model, summary in zip(found["models"].values(), summaries, strict=True):
        assert model["settings"] == summary["settings"]
        for subset in model["results"].keys() & summary["results"].keys() - {"Ties"}:
            ours, theirs = model["results"][subset], summary["results"][subset]
            for key in ("n", "ties", "accuracy", "accuracy_low", "accuracy_high"):
                assert ours[key] == pytest.approx(theirs[key]), (subset, key)
    assert found["rows"] == {"batch": 60, "version 1": 46, "version 2": 23, "prior sets": 23}[kind]
    if kind == "version 2":
        ties = [model["results"]["Ties"] for model in found["models"].values()]
        assert [row["accuracy"] * 8 for row in ties] == [summary["results"]["Ties"]["correct"] for summary in summaries]
    printed = capsys.readouterr().out
    assert f"{found['against_baseline'][paths[1].stem]['results']['all']['difference']:+.4f}" in printed


def test_best_of_n_rows_agree_on_the_best_response_and_pairs_of_ties_stay_together(tmp_path):
    def row(name: str, subset: str, right: int, merit: list[float], correct: float) -> dict:
        lists = {"score": merit, "probability": [0.5 + value / 10 for value in merit], "merit": merit}
        return {"id": name, "subset": subset, "right": right, "scores": [], "correct": correct} | lists

    ours = ([3, 1, 2], 1.0), ([1, 3, 2], 0.0), ([2, 2, 1], 0.5)
    theirs = ([3, 2, 1], 1.0), ([1, 2, 3], 0.0), ([2, 1, 1], 1.0)
    a, b = ([row(str(i), "Math", 1, *decided) for i, decided in enumerate(side)] for side in (ours, theirs))
    a += [row("ref:7", "Ties", 1, [2, 0], 1.0), row("tied:7", "Ties", 2, [2, 3, 1], 1.0)]
    b += [row("ref:7", "Ties", 1, [0, 2], 0.0), row("tied:7", "Ties", 2, [3, 2, 1], 1.0)]
    found = compare(tmp_path, a, b)
    against = found["against_baseline"]["b"]["results"]
    assert against["Math"]["agreement"] == pytest.approx(1 / 3), "two wrong responses are two decisions"
    assert (
        against["Math"]["difference"] == pytest.approx(0.5 / 3) and found["models"]["a"]["results"]["Math"]["ties"] == 1
    )
    assert against["Ties"]["agreement"] == 0.5 and against["Ties"]["difference"] == -0.5
    assert against["Ties"]["low"] is None, "a prompt and its partner are one cluster"
    listed = {row["id"]: row["probability"] for row in found["against_baseline"]["b"]["most_different"]}
    assert listed["ref:7"] == {"a": 0.7, "b": 0.5} and listed["1"] == {"a": 0.6, "b": 0.6}


def test_a_model_against_itself_and_several_models(tmp_path, capsys):
    rows = [pair(i, (-1) ** i * i) for i in range(20)]
    other = [pair(i, 1.0) for i in range(20)]
    found = compare(tmp_path, rows, rows, other)
    same, constant = (found["against_baseline"][label]["results"]["all"] for label in "bc")
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)
    assert (same["agreement"], same["better"], same["worse"]) == (1, 0, 0) and same["spearman"] == pytest.approx(1)
    assert found["against_baseline"]["b"]["most_different"] == [] and constant["spearman"] == "constant"
    assert found["agreement"]["b"]["c"] == found["agreement"]["c"]["a"] == 9 / 20
    printed = capsys.readouterr().out
    assert "constant" in printed and "agreement: share of comparisons decided alike" in printed


def test_models_are_named_after_themselves_if_that_tells_them_apart(tmp_path):
    def named(a: str, b: str) -> list[str]:
        for file, asked in (("a", {"model": a}), ("b", {"pretrain": b})):
            write(tmp_path / f"{file}.summary.json", {"settings": {"asked": asked}})
        return list(compare(tmp_path, [pair(0, 1)], [pair(0, -1)])["models"])

    assert named("general-preference/GPM-2B", "runs/rm-tiny/") == ["GPM-2B", "rm-tiny"]
    assert named("runs/one/model", "runs/two/model") == ["a", "b"]
    assert named("$x", "runs/$y_$") == ["$x", "$y_$"]  # no formulas in the picture


A, ROWS = "a.jsonl", [pair(0, 1, "x"), pair(1, -1, "y"), pair(2, 1, "y")]
REFUSED = {
    "one file": ([A], "only a.jsonl is given"),
    "the same file twice": ([A, "./a.jsonl"], "a.jsonl is given twice"),
    "no such file": ([A, "missing.jsonl"], "missing.jsonl cannot be read (No such file"),
    "a folder": ([A, "folder"], "folder cannot be read"),
    "an empty file": ([A, "empty.jsonl"], "empty.jsonl is empty"),
    "a text": ([A, "text.jsonl"], "text.jsonl, line 1 is no row of results"),
    "half a line": ([A, "half.jsonl"], "half.jsonl, line 3 is no row of results"),
    "data": ([A, "data.jsonl"], "data.jsonl, line 1 is no row of results (it has no 'label')"),
    "no number": ([A, "nan.jsonl"], "nan.jsonl, line 1 is no row of results (it holds NaN)"),
    **{
        f"bad {name}": ([A, f"bad_{name}.jsonl"], f"bad_{name}.jsonl, line 1 is no row of results (its {name} is")
        for name in ("score", "probability", "label", "correct", "subset")
    },
    "fewer rows": ([A, "fewer.jsonl"], "a.jsonl has 3 rows, fewer.jsonl ends before row 3"),
    "other ids": ([A, "ids.jsonl"], "row 2 has id 'c9' in ids.jsonl, 'c1' in a.jsonl"),
    "other subsets": ([A, "subsets.jsonl"], "row 1 has subset '' in subsets.jsonl, 'x' in a.jsonl"),
    "other labels": ([A, "labels.jsonl"], "row 3 has label 0.2 in labels.jsonl, 1.0 in a.jsonl"),
    "another kind": ([A, "kind.jsonl"], "kind.jsonl holds pairs of RewardBench, a.jsonl results of batch inference"),
    "two kinds in one": ([A, "mixed.jsonl"], "mixed.jsonl, line 2 is no row of results (it belongs to pairs"),
    "a stopped run": ([A, "stopped.jsonl"], "stopped.jsonl is of a run that was stopped"),
    "other texts": (["b.jsonl", "texts.jsonl"], "the same rows have other texts (data two in texts.jsonl, one in b."),
    "no JSON to write": ([A, "b.jsonl", "--output", "b.jsonl"], "--output 'b.jsonl' must end in .json"),
    "an input as output": ([A, "rows.json", "--output", "rows.json"], "--output rows.json is rows.json, which is read"),
    "a summary as output": ([A, "b.jsonl", "--output", "b.summary.json"], "--output b.summary.json is"),
    "another file as output": ([A, "b.jsonl", "--output", "mine.json"], "mine.json is of no comparison"),
    "another picture": ([A, "b.jsonl", "--output", "draw.json"], "draw.png is of no comparison"),
    "a negative number": ([A, "b.jsonl", "--top", "-1"], "--top -1 must be at least 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    for name in (A, "b.jsonl", "texts.jsonl", "rows.json"):
        Path(name).write_text("\n".join(map(json.dumps, ROWS)))
    Path("folder").mkdir()
    for name, content in (("empty.jsonl", ""), ("text.jsonl", "text"), ("mine.json", "{}"), ("draw.png", "")):
        Path(name).write_text(content)
    Path("half.jsonl").write_text("\n".join(map(json.dumps, ROWS))[:-9])
    write(Path("data.jsonl"), [{"id": "c0", "prompt": "p", "chosen": "a", "rejected": "b"}])
    write(Path("nan.jsonl"), [ROWS[0] | {"score": float("nan")}])
    bad = {"score": "1e400", "probability": -5, "label": 10**400, "correct": "yes", "subset": [1]}
    for name, value in bad.items():
        write(Path(f"bad_{name}.jsonl"), [ROWS[0] | {name: value}])
    write(Path("fewer.jsonl"), ROWS[:2])
    write(Path("ids.jsonl"), [ROWS[0], ROWS[1] | {"id": "c9"}, ROWS[2]])
    write(Path("subsets.jsonl"), [{k: v for k, v in row.items() if k != "subset"} for row in ROWS])
    write(Path("labels.jsonl"), [*ROWS[:2], ROWS[2] | {"label": 0.2}])
    write(Path("kind.jsonl"), [row | {"correct": 1} for row in ROWS])
    write(Path("mixed.jsonl"), [ROWS[0], ROWS[1] | {"correct": 1}])
    Path("stopped.jsonl.parts").mkdir()
    for name in (Path("stopped.jsonl.parts", "settings.json"), Path("b.summary.json"), Path("texts.summary.json")):
        write(name, {"settings": {"asked": {}, "data": "two" if name.stem.startswith("texts") else "one"}})
    arguments, message = REFUSED[case]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") or f" {message}" in error, error
    assert error.count("\n") == 1 and {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_rows_without_ids_are_known_by_their_line_wherever_the_data_was(tmp_path, capsys):
    def place(folder: str, line: int) -> list[dict]:
        return [pair(0, 1) | {"id": f"{folder}/rows.jsonl, line {line}"}]

    assert compare(tmp_path, place("/here", 3), place("/there/too", 3))["comparisons"] == 1
    write(tmp_path / "b.jsonl", place("/there", 4))
    assert main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 2
    assert "row 1 has id 'rows.jsonl, line 4'" in capsys.readouterr().err


def test_the_script_runs_and_replaces_what_it_wrote(tmp_path, monkeypatch):
    for name, scores in (("a", (1, 2, -1)), ("b", (1, -2, -3))):
        write(tmp_path / f"{name}.jsonl", [pair(i, score) for i, score in enumerate(scores)])
    command = [sys.executable, "-W", "error::FutureWarning", str(ROOT / "eval/compare_models.py"), "a.jsonl", "b.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "b against a" in done.stdout and "-0.3333" in done.stdout
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    assert json.loads((tmp_path / "comparison.json").read_text())["baseline"] == "a"
    monkeypatch.chdir(tmp_path)
    assert main(["b.jsonl", "a.jsonl"]) == 0
    assert json.loads((tmp_path / "comparison.json").read_text())["baseline"] == "b"
