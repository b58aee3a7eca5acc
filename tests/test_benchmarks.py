"""The benchmarks run, and what they compare computes the same: on tiny sizes, so no timing is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.train_throughput import main, share_of_limit, speed

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden_size=32", "--intermediate_size=64", "--layers=2", "--heads=4", "--key_value_heads=2"]
TINY += ["--vocabulary=600", "--global_batch=4", "--steps=2", "--rounds=0", "--micro_batches=2"]


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_training_steps_are_compared_on_equal_terms(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "train_throughput.py"), *TINY, "--head=gpm"]
    command += ["--implementations=this,padded", f"--output={output}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())
    this, padded = found["runs"]
    assert (this["name"], padded["name"]) == ("this", "padded") and found["best"] == {"this": 2, "padded": 2}
    assert this["losses"] == pytest.approx(padded["losses"], abs=1e-5) and len(set(this["losses"])) == 3, "every step"
    for run in (this, padded):
        assert run["comparisons"] == 8 and run["unique_tokens"] == this["unique_tokens"] > 100
        assert run["parameters"] == this["parameters"] and run["peak_bytes"] > 10**8
        assert 0 < share_of_limit(run, found["matmul_flops"]) < 1.5 and speed(run) > 0
    assert output.with_suffix(".png").stat().st_size > 5000 and "this trainer" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--implementations", "this,other"], "other is none of this, regularized, padded, trl"),
        (["--micro_batches", "3"], "must be a multiple"),
        (["--micro_batches", "a"], "is no list"),
        (["--micro_batches", "0"], "every number must be at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--dataset", "/nowhere/x.jsonl"], "/nowhere/x.jsonl does not exist"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, message):
    assert main([*TINY, "--output", str(tmp_path / "r.json"), *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "r.json").exists()
