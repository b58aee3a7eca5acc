"""kill -9 in the stages of policy alignment behind generation, and the same commands again: the same files."""

import json
import os
from pathlib import Path

import pytest

from general_preference.trainer.metrics import MEASURED, read_metrics
from tests.forks import ENVIRONMENT, run_forks
from tests.test_policy_training import random_samples, write

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def in_forks(folder: Path, job: list) -> list[list]:
    """[[exit code, terminal], ...] of kill_worker.py."""
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(ROOT / "tests" / "kill_worker.py"), str(folder / "job.json")]
    done = run_forks(1, command, os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, object]:
    """Every file of a run: its bytes, of metrics what no clock measured, of checkpoints, which hold it too, none."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes()
        if file.name == "metrics.jsonl":
            content = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(file)]
        elif "checkpoint" in file.parts:
            content = None
        found[str(file.relative_to(folder))] = content
    return found


@pytest.fixture(scope="module")
def chains(model_folder, saved, tmp_path_factory) -> tuple[Path, dict[str, list]]:
    """RUN/whole, made without a stop, and RUN/run, made with kills; {"stage": [[code, terminal] of each start]}."""
    folder = tmp_path_factory.mktemp("kills")
    policy, judge, rows = model_folder("llama"), saved(), random_samples(8)
    _, start, *_ = write(folder, "start", rows, policy)
    turned = [row | {name: row[name][::-1] for name in ("responses", "response_ids", "finished")} for row in rows]
    _, now, *_ = write(folder, "now", turned, policy)
    run = folder / "run"
    train = ["--policy", policy, "--samples", start, "--scores", str(run / "scored.jsonl"), "--load_checkpoint"]
    train += ["--micro_train_batch_size", "2", "--max_epochs", "3", "--save_steps", "4"]
    train += ["--save_path", str(run / "policy"), "--wandb_run_name", "kills"]
    compare = ["--samples", f"start={start}", f"1={now}", "--output", str(run / "report.json"), "--skip_finished"]
    compare += ["--train_report", str(run / "policy" / "train_report.json"), "--model", judge, "--judge", judge]
    stages = {
        "score": ("score_responses", ["--model", judge, "--samples", start, "--output", str(run / "scored.jsonl")]),
        "train": ("train_policy_general_preference", train),
        "compare": ("compare_policies", compare),
    }
    results = in_forks(folder, [[*stage, None] for stage in stages.values()])
    assert [code for code, _ in results] == [0, 0, 0], results
    run.rename(folder / "whole")
    job, kills = [], {
        "score": [4, "*/.scored.jsonl.tmp", "*/.scored.summary.json.tmp"],
        "train": [4, "*/.writing_step_8/manifest.json", "*/policy/model.safetensors", "*/.train_report.json.tmp"],
        "compare": [4, "*/.report.judge.jsonl.tmp", "*/.report.json.tmp", "*/report.png"],
    }  # fmt: skip
    for name, stage in stages.items():
        job += [[*stage, kill] for kill in [*kills[name], None]]
    results = iter(in_forks(folder, job))
    return folder, {name: [next(results) for _ in [*kills[name], None]] for name in stages}


@pytest.mark.parametrize("stage", ["score", "train", "compare"])
def test_every_kill_struck_and_the_last_start_ended(chains, stage):
    _, starts = chains
    assert [code for code, _ in starts[stage]] == [-9] * (len(starts[stage]) - 1) + [0], starts[stage]


def test_what_is_left_is_what_a_run_without_a_stop_leaves(chains):
    folder, starts = chains
    whole, killed = contents(folder / "whole"), contents(folder / "run")
    assert whole.keys() == killed.keys() and len(whole) > 20
    assert [name for name in whole if whole[name] != killed[name]] == []
    assert "continuing from" in starts["train"][2][1], "the second kill struck after the first checkpoint"
