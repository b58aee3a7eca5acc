"""The loop of policy alignment as people start it: killed and started again, finished, changed, without a file."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.test_alignment_kills import contents, in_forks

ROOT = Path(__file__).resolve().parents[1]
LOOP = str(ROOT / "scripts" / "run_align_general_preference.sh")
SETTINGS = ("POLICY", "PREFERENCE", "JUDGE", "PROMPTS", "EVAL_PROMPTS", "ITERATIONS", "SAMPLES", "TOKENS", "SAVE_PATH")
SETTINGS += ("NPROC", "RESTARTS", "GENERATE_PYTHON")
FLAGS = ["--zero_stage", "0", "--micro_train_batch_size", "2", "--wandb_run_name", "loop"]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def given(model_folder, saved, tmp_path_factory) -> dict[str, str]:
    """The smallest settings: four prompts, two held out, three responses of at most eight tokens."""
    folder = tmp_path_factory.mktemp("loop")
    for name, count in (("train", 4), ("held_out", 2)):
        rows = [{"id": f"{name}{i}", "prompt": f"Which throw wins, number {i}?"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"POLICY": model_folder("llama"), "PREFERENCE": saved(), "PROMPTS": str(folder / "train.jsonl")}
    given |= {"EVAL_PROMPTS": str(folder / "held_out.jsonl"), "SAVE_PATH": str(folder / "run")}
    return given | {"ITERATIONS": "1", "SAMPLES": "3", "TOKENS": "8"}


def start(given: dict[str, str]) -> subprocess.Popen:
    """The loop in a process group of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | given
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", LOOP, *FLAGS], env=environment, start_new_session=True, **pipes)


def end(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, stderr)."""
    said = process.communicate(timeout=400)[1]
    return process.returncode, said


def written(folder: Path) -> dict[str, tuple]:
    """Which file stands where, what it holds and, but of summaries, which are written again, since when."""
    times = {name: (folder / name).stat().st_mtime_ns for name in contents(folder) if "summary" not in name}
    return {name: (content, times.get(name)) for name, content in contents(folder).items()}


def stage_by_stage(given: dict[str, str]) -> list:
    """The job of kill_worker.py that makes what the loop makes of `given`, as its users would by hand."""
    run, policy, judge = Path(given["SAVE_PATH"]), given["POLICY"], given["PREFERENCE"]
    first, held_out, samples = (run / name for name in ("iter_1", "start/held_out.jsonl", "iter_1/samples.jsonl"))

    def sample(model, prompts, output):
        flags = ["--policy", model, "--prompts", prompts, "--output", output, "--samples", 3, "--max_new_tokens", 8]
        return ["generate_responses", list(map(str, flags)), None]

    train = ["--policy", policy, "--samples", samples, "--scores", first / "scored.jsonl", "--save_path",
             first / "policy", "--start", policy, "--load_checkpoint", "--skip_finished", *FLAGS]  # fmt: skip
    compare = ["--samples", f"start={held_out}", f"1={first / 'held_out.jsonl'}", "--model", judge, "--output",
               first / "report.json", "--train_report", first / "policy" / "train_report.json"]  # fmt: skip
    score = ["--model", judge, "--samples", samples, "--output", first / "scored.jsonl"]
    return [
        sample(policy, given["EVAL_PROMPTS"], held_out),
        sample(policy, given["PROMPTS"], samples),
        ["score_responses", list(map(str, score)), None],
        ["train_policy_general_preference", list(map(str, train)), None],
        sample(first / "policy", given["EVAL_PROMPTS"], first / "held_out.jsonl"),
        ["compare_policies", list(map(str, compare)), None],
    ]


@pytest.fixture(scope="module")
def killed(given) -> tuple[Path, Path]:
    """(what the stages left, what the loop left that was killed while it trained and started again)."""
    run = Path(given["SAVE_PATH"])
    results = in_forks(run.parent, stage_by_stage(given))
    assert [code for code, _ in results] == [0] * 6, results
    run.rename(run.parent / "whole")
    process, anchors = start(given), run / "iter_1" / "policy" / "anchors" / "train_t.jsonl"
    while process.poll() is None and not anchors.is_file():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert end(process)[0] == -signal.SIGKILL and not (run / "iter_1" / "policy" / "train_report.json").exists()
    code, said = end(start(given))
    assert code == 0, said[-3000:]
    return run.parent / "whole", run


def test_a_killed_loop_that_starts_again_leaves_what_its_stages_leave(killed):
    whole, run = map(contents, killed)
    assert {"iter_1/report.json", "iter_1/report.png", "iter_1/policy/model.safetensors"} < run.keys()
    assert run.keys() == whole.keys() and [name for name in whole if whole[name] != run[name]] == []


def test_a_second_run_does_nothing(killed, given):
    before = written(killed[1])
    code, said = end(start(given))
    assert code == 0 and "report.json is finished" in said and written(killed[1]) == before


def test_a_changed_flag_is_refused_by_name(killed, given):
    """By the stage that the loop hands its flags to (test_launchers.py), where the stages before it are done."""
    before, (script, flags, _) = written(killed[1]), stage_by_stage(given)[3]
    ((code, said),) = in_forks(killed[1].parent, [[script, [*flags, "--beta", "3"], None]])
    assert code == 2 and said.strip().splitlines()[-1].startswith("error: ") and said.count("error: ") == 1
    assert "was trained with beta 10.0, now it is 3.0" in said and written(killed[1]) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"EVAL_PROMPTS": "/nowhere/held_out.jsonl"}, "/nowhere/held_out.jsonl does not exist"),
        ({"PREFERENCE": ""}, "PREFERENCE names no preference model"),
        ({"ITERATIONS": "0"}, "ITERATIONS=0 is no number of at least 1"),
    ],
)
def test_what_is_missing_is_one_line(given, tmp_path, change, message):
    code, said = end(start(given | {"SAVE_PATH": str(tmp_path / "run")} | change))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in said
