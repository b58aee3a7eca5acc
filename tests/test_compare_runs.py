"""Runs side by side: the table and both pictures."""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from scripts.compare_runs import main

CYCLE = Path(__file__).resolve().parents[1] / "data" / "cyclic" / "test.jsonl"


def test_runs_are_compared_in_a_table_and_two_pictures(make_model, model_folder, tmp_path, monkeypatch, capsys):
    for name, head, dim, gate in (("bt", "bt", 1, False), ("gpm", "gpm", 4, True)):
        make_model("llama", head, dim, gate).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(tmp_path / name)
        results = {"cyclic": {"accuracy": 0.5 if head == "bt" else 0.96875}}
        (tmp_path / name / "eval_metrics.json").write_text(json.dumps(results))
    picture = tmp_path / "new.png"
    command = ["compare_runs.py", tmp_path / "bt", tmp_path / "gpm", "--output", picture, "--cycle", CYCLE]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert main() == 0
    printed = capsys.readouterr().out
    assert (
        "Bradley-Terry" in printed and "GPM D=4 gate" in printed and "|  0.500 |" in printed and "|  0.969 |" in printed
    )
    for file in (picture, tmp_path / "cycle.png"):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 and str(file) in printed


def test_runs_of_one_head_are_seeds(make_model, tmp_path, monkeypatch, capsys):
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        make_model("llama", "bt", 1, False).save_pretrained(tmp_path / str(seed))
        (tmp_path / str(seed) / "eval_metrics.json").write_text(json.dumps({"cyclic": {"accuracy": accuracy}}))
    runs = [str(tmp_path / str(seed)) for seed in range(3)]
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *runs, "--output", str(tmp_path / "new.png")])
    assert main() == 0
    assert capsys.readouterr().out.count("| Bradley-Terry | 0.600 +-0.248 |") == 1  # 4.303 * 0.1 / sqrt(3)


def test_a_run_without_an_evaluation_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path)])
    assert main() == 2 and capsys.readouterr().err.startswith("error: not a finished run")
