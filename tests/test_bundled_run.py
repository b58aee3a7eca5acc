"""What the README's first command trains, used as a reader would: loaded in a fresh process, over its test sets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import ENVIRONMENT, run_forks

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "scripts" / "run_train_rm_general_preference_single.sh"
EVALUATE = ROOT / "eval" / "batch_inference_rm_general_preference.sh"
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

LOOK = """
import json, sys
from general_preference import GPMPipeline
from general_preference.inference import ranking

def look(group):
    prompt, responses = group["prompt"], group["responses"]
    matrix = rm.preference_matrix(prompt, responses)
    return {
        "stated": [matrix[winner, loser].item() for winner, loser in group["preferences"]],
        "cycles": ranking.cycles(matrix, longest=max(3, len(responses))),
        "rank": {method: rm.rank(prompt, responses, method) for method in ranking.METHODS},
        "nash": ranking.nash(matrix).tolist(),
        "borda": ranking.borda(matrix).tolist(),
        "cyclic_share": ranking.hodge(rm.score_matrix(prompt, responses)).cyclic_share,
    }

rm = GPMPipeline(sys.argv[1])
print(json.dumps([[look(json.loads(line)) for line in open(file, encoding="utf-8")] for file in sys.argv[2:]]))
"""


def run(*command, **extra) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | extra
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the run that the launcher makes without any setting."""
    folder = tmp_path_factory.mktemp("bundled") / "gpm"
    run("bash", TRAIN, SAVE_PATH=str(folder))
    return folder


def look(folder, *kinds: str) -> list[list[dict]]:
    files = [ROOT / "data" / kind / "test.jsonl" for kind in kinds]
    return json.loads(run(sys.executable, "-c", LOOK, folder, *files).stdout)


def forked(script: Path, *flags) -> str:
    """What a script prints that runs in a fork (tests/forks.py)."""
    done = run_forks(1, list(map(str, (script, *flags))), os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def looked(trained):
    return look(trained, "cyclic", "transitive")


def test_held_out_cycles_are_cycles(looked):
    groups = looked[0]
    stated = [probability for group in groups for probability in group["stated"]]
    assert sum(probability > 0.5 for probability in stated) / len(stated) > 0.97
    assert sum(group["cyclic_share"] for group in groups) / len(groups) > 0.9
    threes = [group for group in groups if len(group["borda"]) == 3]
    assert len(threes) > 10
    for group in threes:
        if min(group["stated"]) > 0.75:  # a cycle that was learned
            assert len(group["cycles"]) == 1 and group["cyclic_share"] > 0.8
            assert all(0.1 < weight < 0.7 for weight in group["nash"]), "it mixes the members"
            assert all(abs(value - 0.5) < 0.15 for value in group["borda"]), "it ties them"
    assert sum(min(group["stated"]) > 0.75 for group in threes) > 0.9 * len(threes)


def test_held_out_rankings_are_rankings(looked):
    groups = looked[1]
    without = [group for group in groups if not group["cycles"]]
    assert len(without) > 0.9 * len(groups)
    for group in without:
        assert group["rank"]["copeland"] == group["rank"]["borda"]
        assert max(group["nash"]) > 0.99 and group["nash"].index(max(group["nash"])) == group["rank"]["borda"][0]


def test_bradley_terry_has_no_cycles(trained, tmp_path):
    """On the tiny model that the launcher made, with its preset."""
    flags = ["--preference_head", "bt", "--pretrain", json.loads((trained / "arguments.json").read_text())["pretrain"]]
    flags += ["--dataset", ROOT / "data" / "cyclic" / "train.jsonl", "--max_epochs", "1", "--max_samples", "200"]
    flags += ["--config", ROOT / "scripts" / "presets" / "tiny.yaml", "--save_path", tmp_path / "bt"]
    forked(ROOT / "scripts" / "train_rm_general_preference.py", *flags, "--micro_train_batch_size", "16")
    (tmp_path / "look.py").write_text(LOOK)
    cyclic = ROOT / "data" / "cyclic" / "test.jsonl"
    for group in json.loads(forked(tmp_path / "look.py", tmp_path / "bt", cyclic).splitlines()[-1])[0]:
        assert group["cyclic_share"] < 1e-9 and group["cycles"] == []
        assert group["rank"]["borda"] == group["rank"]["copeland"] == group["rank"]["nash"]


def test_batch_inference_repeats_the_trainers_evaluation(trained, tmp_path):
    """On two processes, through the launcher, over the three test sets."""
    output = tmp_path / "results.jsonl"
    done = run("bash", EVALUATE, PRETRAIN=str(trained), OUTPUT_PATH=str(output), NPROC="2")
    evaluated = json.loads((trained / "eval_metrics.json").read_text())
    found = json.loads((tmp_path / "results.summary.json").read_text())["results"]
    for name, row in evaluated.items():
        for key, value in row.items():
            assert found[f"{name}/test"][key] == pytest.approx(value, abs=1e-6), (name, key)
    assert len(output.read_text().splitlines()) == 245 and f"{found['all']['accuracy']:.4f}" in done.stdout


def test_the_example_runs_with_and_without_a_trained_model(trained, tmp_path):
    example = ROOT / "gpm_example_usage.py"
    found = run(sys.executable, example, trained).stdout
    assert "score of 1 over 2 [" in found and "rank by nash" in found
    for name in ("general_preference", "scripts", "data"):  # a checkout without a checkpoint folder
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(example, tmp_path)
    made = run(sys.executable, tmp_path / example.name, PYTHONPATH=str(tmp_path))
    assert "making an untrained one" in made.stdout and "rank by nash" in made.stdout


def test_walkthrough(trained, tmp_path, monkeypatch):
    """The notebook runs as it is, and shows what its text says."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in (("MODEL", trained), ("WALKTHROUGH", tmp_path), ("PYTHONPATH", ROOT), ("WANDB_MODE", "offline")):
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(ROOT / "docs" / "walkthrough.ipynb", as_version=4)
    stored = [cell.get("outputs") for cell in notebook.cells]
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "docs")}})
    client.execute()
    for outputs in (stored, [cell.get("outputs") for cell in notebook.cells]):
        found = [output for some in outputs for output in some or ()]
        texts = "".join(one.get("text", "") + one.get("data", {}).get("text/plain", "") for one in found)
        assert sum("image/png" in one.get("data", {}) for one in found) == 3
        assert "cyclic share: 0.9" in texts and "equal to 1e-5: True" in texts and "error" not in texts.lower()
        table = dict(re.findall(r"^(GPM|reward model of TRL) +([\d.]+)", texts, re.MULTILINE))
        assert float(table["GPM"]) > 0.9 and float(table["reward model of TRL"]) <= 0.741, "accuracy on cycles"
