"""The benchmarks run, and what they compare computes the same: on tiny sizes, so no timing is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import evaluation_throughput, group_evaluation, ranking_throughput, tokenization
from benchmarks.train_throughput import main, make_backbone, parse, share_of_limit, speed, step_size, write_groups
from benchmarks.training_steps import run_padded, trainer_arguments
from general_preference.datasets.packing import Collator
from general_preference.models.reward_model import get_reward_model
from general_preference.trainer.arguments import LossArguments
from general_preference.trainer.objectives import batch_loss

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden_size=32", "--intermediate_size=64", "--layers=2", "--heads=4", "--key_value_heads=2"]
TINY += ["--vocabulary=600", "--global_batch=4", "--steps=2", "--rounds=0", "--micro_batches=2"]


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_training_steps_are_compared_on_equal_terms(tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--head=gpm", "--implementations=this,regularized,padded", f"--output={output}"]
    code, (said, errors) = main([*TINY, *flags]), capsys.readouterr()
    assert code == 0, errors[-2000:]
    found = json.loads(output.read_text())
    this, regularized, padded = found["runs"]
    assert found["best"] == {"this": 2, "regularized": 2, "padded": 2}
    assert (this["name"], regularized["name"], padded["name"]) == ("this", "regularized", "padded")
    assert regularized["losses"][0] > this["losses"][0] + 0.1 and "arithmetic of its logits" in said
    assert 0 < regularized["chosen_tokens"] < this["unique_tokens"]
    assert this["losses"] == pytest.approx(padded["losses"], abs=1e-5) and len(set(this["losses"])) == 3, "every step"
    for run in (this, padded):
        assert run["comparisons"] == 8 and run["unique_tokens"] == this["unique_tokens"] > 100
        assert run["parameters"] == this["parameters"] and run["peak_bytes"] > 10**8
        assert 0 < share_of_limit(run) < 1.5 and speed(run) > 0
    assert output.with_suffix(".png").stat().st_size > 5000 and "this trainer" in said


def test_all_pairs_of_a_group_are_the_trainers_loss(tmp_path):
    """The padded step, which runs every pair alone, has the loss of groups that share their prompts and responses."""
    flags = [*TINY, "--head=gpm", "--responses=4", "--global_batch=3", "--micro_batch=9", "--run=padded"]
    arguments = parse([*flags, f"--backbone={tmp_path / 'backbone'}"])
    write_groups(arguments.dataset, tmp_path / "groups.jsonl", 4)
    arguments.dataset = str(tmp_path / "groups.jsonl")
    groups = [json.loads(line) for line in Path(arguments.dataset).read_text().splitlines()]
    assert all(len(group["responses"]) == 4 and len(group["preferences"]) == 6 for group in groups)
    assert all(group["responses"][0] not in group["responses"][1:] for group in groups)
    assert (step_size(arguments, "this"), step_size(arguments, "trl")) == ((3, "prompts"), (18, "pairs"))
    make_backbone(arguments)
    found = run_padded(arguments)
    preference = trainer_arguments(arguments).model.preference(arguments.max_len)
    model = get_reward_model(str(arguments.backbone), bf16=False, preference=preference)
    collate = Collator(0, model.train().layout_on())
    batch = collate([found["table"][index] | {"weight": 1 / 3} for index in found["order"][:3]])
    with torch.no_grad():
        whole = batch_loss(model(**batch.model_inputs()), batch, LossArguments())
    assert len(whole.score) == 18 and found["losses"][0] == pytest.approx(whole.total.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--implementations", "this,other"], "other is none of this, regularized, padded, trl"),
        (["--micro_batches", "3"], "must be a multiple"),
        (["--micro_batches", "a"], "is no list"),
        (["--micro_batches", "0"], "every number must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--global_batch", "-4"], "--global_batch -4 must be at least 1"),
        (["--rounds", "-1"], "--rounds -1 must be at least 0"),
        (["--output", "r.png"], "must be a file, such as result.json"),
        (["--responses", "4000"], "has too few different responses"),
        (["--responses", "1"], "leaves nothing to compare"),
        (["--responses", "4", "--peer_micro_batches", "5"], "a step of padded pairs, eager has 24 pairs"),
        (["--dataset", "/nowhere/x.jsonl"], "/nowhere/x.jsonl does not exist"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, message):
    assert main([*TINY, "--output", str(tmp_path / "r.json"), *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "r.json").exists()


def test_ranking_ways_agree(tmp_path, saved, capsys):
    output = tmp_path / "ranking.json"
    flags = ["--responses=2,5", "--prompt_tokens=20", "--response_tokens=6", "--repeats=1", "--batch=2"]
    assert ranking_throughput.main([saved(), *flags, f"--output={output}"]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())["runs"]
    assert [(one["responses"], one["pairs"]) for one in found] == [(2, 1), (5, 10)]
    assert all(one["largest_difference"] < 1e-5 and len(one["seconds"]["shared"]) == 1 for one in found)
    assert output.with_suffix(".png").stat().st_size > 5000 and "counted" in capsys.readouterr().out
    assert ranking_throughput.main([saved(), "--responses=1", f"--output={output}"]) == 2
    assert "a ranking needs at least 2" in capsys.readouterr().err


def test_evaluation_ways_agree(tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    flags = ["--comparisons=9", "--part=4", "--hidden_size=32", "--layers=2", "--padded_batches=1,3"]
    assert evaluation_throughput.main([*flags, f"--output={output}"]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())
    assert found["comparisons"] == 9 and found["difference"] < 1e-5 and min(found["seconds"].values()) > 0


def test_groups_score_as_pairs_do(tmp_path, capsys):
    output = tmp_path / "groups.json"
    flags = ["--responses=6", "--pairs=4,9", "--records=1", "--prompt=12", "--response=8", "--hidden_size=32"]
    assert group_evaluation.main([*flags, "--layers=2", f"--output={output}"]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())
    assert found["largest_difference"] < 1e-5 and found["ratios"]["9"] == pytest.approx(found["ratios"]["4"] * 9 / 4)
    assert group_evaluation.main(["--responses=6", "--pairs=10", f"--output={output}"]) == 2
    assert "6 responses, half of them right, have 9 conflict pairs at most" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.timeout(200)
def test_growth_covers_what_fits(tmp_path):
    output = tmp_path / "growth.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "growth.py"), "--lengths=16,64", "--micro_batches=1,4"]
    command += ["--most_tokens=200", "--hidden_size=32", "--heads=4", "--layers=2", "--repeats=1", f"--output={output}"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())["runs"]
    assert [(one["length"], one["micro_batch"], one["tokens"]) for one in found] == [
        (16, 1, 24),
        (16, 4, 96),
        (64, 1, 96),
    ]
    assert all(one["tokens_per_second"] > 0 for one in found) and output.with_suffix(".png").stat().st_size > 5000


@pytest.mark.timeout(200)
def test_tokenisation_is_read_again(tmp_path, saved, capsys):
    output = tmp_path / "tokenization.json"
    flags = [f"--tokenizer={saved()}", "--comparisons=40", f"--output={output}"]
    assert tokenization.main(flags) == 0, capsys.readouterr().err
    first, second = json.loads(output.read_text())["runs"]
    assert (first["start"], second["start"]) == ("first", "second") and first["comparisons"] == 40
    assert first["tokens_read"] == second["tokens_read"] == first["tokens"] == second["tokens"] > 40 * 20
