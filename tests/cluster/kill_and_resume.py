#!/usr/bin/env python3
"""One run ended again and again and continued each time, beside one that is left alone: both must come out the same.

    python tests/cluster/kill_and_resume.py                      20 times kill -9, every third one during a save
    python tests/cluster/kill_and_resume.py --signal TERM        20 times SIGTERM
    python tests/cluster/kill_and_resume.py --processes 2 --stops 6

Compares metrics.jsonl (all but what is measured with a clock), the weights, and the record of the best models: to the
last bit on one process, to 1e-6 on two. Takes about six minutes on two cores. Exit code 0 if they are the same.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

from general_preference.trainer.metrics import MEASURED, read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS_BETWEEN_SAVES = 4


def command(model: Path, folder: Path, processes: int) -> list[str]:
    """The training command; the global batch is 8 on one process and on two."""
    data = ROOT / "data"
    start = [sys.executable]
    if processes > 1:
        start += [str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", str(processes)]
    return [
        *start, str(ROOT / "scripts" / "train_rm_general_preference.py"), "--pretrain", str(model),
        "--dataset", f"{data}/cyclic/train.jsonl,{data}/transitive/train.jsonl", "--max_samples", "160",
        "--train_split_ratio", "0.9", "--max_len", "256", "--learning_rate", "1e-3", "--max_epochs", "14",
        "--micro_train_batch_size", str(4 // processes), "--accumulated_gradient", "2", "--is_general_preference",
        "--value_head_dim", "4", "--add_prompt_head", "--lora_rank", "4", "--lora_dropout", "0.1",
        "--logging_steps", "3", "--eval_steps", "10", "--save_best_model", "2", "--zero_stage", "2",
        "--save_steps", str(STEPS_BETWEEN_SAVES), "--load_checkpoint", "--save_path", str(folder),
    ]  # fmt: skip


def start(model: Path, folder: Path, processes: int, log) -> subprocess.Popen:
    """Start the run, its output to `log`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command(model, folder, processes), env=environment, stdout=log, stderr=log, start_new_session=True
    )


def wait_for_progress(process: subprocess.Popen, folder: Path, seen: int) -> None:
    """Until the run has saved a step that it had not saved before."""
    while process.poll() is None and newest(folder) <= seen:
        time.sleep(0.005)


def newest(folder: Path) -> int:
    """The step that `latest` names, 0 without one."""
    pointer = folder / "checkpoint" / "latest"
    return int(pointer.read_text().strip().removeprefix("step_") or 0) if pointer.is_file() else 0


def end(process: subprocess.Popen, folder: Path, number: int, chance: random.Random, progress: bool) -> str:
    """End the run at a random moment, every third time during a save; returns what was hit."""
    seen, hit = newest(folder), "anywhere"
    if progress:  # else it may end before it trains, or before its first checkpoint
        wait_for_progress(process, folder, seen)
    time.sleep(chance.uniform(0, 1.5 if progress else 8))
    if chance.random() < 1 / 3:
        while process.poll() is None and not list((folder / "checkpoint").glob(".writing_step_*")):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
        hit = "during a save" if list((folder / "checkpoint").glob(".writing_step_*")) else "after a save"
    if process.poll() is None:
        # torchrun's processes have sessions of their own and outlive it.
        workers = psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else []
        for each in (process, *workers):
            each.send_signal(number)
    process.wait()
    return f"{hit}, exit code {process.returncode}, newest checkpoint {newest(folder)}"


def differences(expected: Path, found: Path) -> dict[str, float]:
    """{what: largest relative difference} between two runs; a missing or doubled row is infinite."""
    rows = [
        [
            {key: value for key, value in row.items() if key not in MEASURED}
            for row in read_metrics(run / "metrics.jsonl")
        ]
        for run in (expected, found)
    ]
    shapes = [[(row["step"], sorted(row)) for row in part] for part in rows]
    worst = 0.0 if shapes[0] == shapes[1] else float("inf")
    for first, second in zip(*rows, strict=False):
        for key in first.keys() & second.keys():
            worst = max(worst, abs(first[key] - second[key]) / max(abs(first[key]), 1))
    weights = 0.0
    for name in ("adapter_model.safetensors", "preference_heads.safetensors"):
        one, other = load_file(expected / name), load_file(found / name)
        weights = max(weights, *(float((one[key] - other[key]).abs().max()) for key in one))
    best = [json.loads((run / "best" / "best.json").read_text()) for run in (expected, found)]
    names = [[entry["model"] for entry in part] for part in best]
    kept = [sorted(path.name for path in (run / "best").glob("step_*")) for run in (expected, found)]
    return {
        "metrics": worst,
        "weights": weights,
        "best models": 0.0 if names[0] == names[1] and kept[0] == kept[1] else 1,
    }


def main() -> int:
    """Run both, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    number, chance = signal.Signals[f"SIG{arguments.signal}"], random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as base, open(Path(base) / "log", "w+") as log:
        folder = Path(base)
        subprocess.run([sys.executable, ROOT / "scripts" / "make_tiny_model.py", folder / "model"], check=True)
        if start(folder / "model", folder / "whole", arguments.processes, log).wait() != 0:
            log.seek(0)
            sys.stderr.write(log.read()[-3000:])
            return 1
        for stop in range(arguments.stops):
            process = start(folder / "model", folder / "stopped", arguments.processes, log)
            # Now and then one is ended before it gets anywhere.
            print(f"{stop + 1}: {end(process, folder / 'stopped', number, chance, stop % 5 != 0)}", flush=True)
        code = start(folder / "model", folder / "stopped", arguments.processes, log).wait()
        found = differences(folder / "whole", folder / "stopped") if code == 0 else {"exit code": float(code)}
        left = [path.name for path in (folder / "stopped" / "checkpoint").glob(".*") if path.name != ".lock"]
    limit = 0.0 if arguments.processes == 1 else 1e-6
    print(f"largest differences: {found}; left behind: {left}")
    return int(any(not value <= limit for value in found.values()) or bool(left))


if __name__ == "__main__":
    sys.exit(main())
