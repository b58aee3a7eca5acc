"""Training through the real engine: DeepSpeed on CPU, real processes, real files.

Starting Python costs many seconds, so a few runs serve many checks, and most of them are forks (tests/forks.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from general_preference import RewardModel
from general_preference.datasets.packing import Collator
from general_preference.models.attention import RowLayout
from general_preference.trainer.metrics import read_metrics
from tests.forks import fork, run_forks

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "scripts" / "train_rm_general_preference.py")
PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

GPM = ["--is_general_preference", "--value_head_dim", "4", "--add_prompt_head"]


def environment(**extra):
    return os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"} | extra


def launch(processes: int, *command: str, **extra) -> subprocess.CompletedProcess:
    start = [sys.executable]
    if processes > 1:
        start += [str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*start, *command], env=environment(**extra), cwd=ROOT, capture_output=True, text=True, timeout=550
    )


def forked(processes: int, *command: str) -> subprocess.CompletedProcess:
    """As `launch`, without a start of Python and without the launcher."""
    return run_forks(processes, list(command), environment())


def run_cases(
    base: list[str], cases: dict[str, list[str]], folder: Path, processes: int = 1, **more
) -> dict[str, tuple[int, str]]:
    """{name: (exit code, terminal)} of a training script with `base` and each case's flags, started once; `more` of
    the job of script_worker.py."""
    (folder / "job.json").write_text(json.dumps({"base": base, "cases": cases, **more}))
    done = forked(processes, str(ROOT / "tests" / "script_worker.py"), str(folder / "job.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def base(model_folder):
    """Flags of a short real run on bundled comparisons."""
    data = ROOT / "data"
    return [
        "--pretrain", model_folder("llama"), "--dataset", f"{data}/cyclic/train.jsonl,{data}/transitive/train.jsonl",
        "--max_samples", "60", "--train_split_ratio", "0.8", "--eval_dataset", f"cyclic={data}/cyclic/test.jsonl",
        "--max_len", "256", "--learning_rate", "1e-3", "--micro_train_batch_size", "4", "--accumulated_gradient", "2",
        "--eval_steps", "3", "--max_epochs", "1", *GPM,
    ]  # fmt: skip


def train(base, folder, *flags, processes=1, start=forked):
    done = start(processes, SCRIPT, *base, "--save_path", str(folder), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    flags = ["--save_steps", "2", "--save_best_model", "2", "--max_ckpt_num", "2", "--add_pretrain_loss"]
    flags += ["--return_prompt_length", "--use_wandb", "offline"]
    return folder, train(base, folder, *flags, start=launch)


def test_a_run_leaves_what_it_promises(finished):
    folder, done = finished
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 7))
    logged = {"train/loss", "train/accuracy", "train/learning_rate", "train/grad_norm", "train/regularizer"}
    assert logged | {"train/prompt_length", "train/comparisons_per_second"} <= set(rows[0])
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    assert [row["step"] for row in evaluations] == [3, 6]
    results = json.loads((folder / "eval_metrics.json").read_text())
    assert set(results) == {"cyclic", "held_out"}
    for name, row in results.items():
        assert row == {
            key.split("/")[-1]: value for key, value in evaluations[-1].items() if key.startswith(f"eval/{name}/")
        }
        assert {"accuracy", "loss", "n", "ties", "probability", "margin", "calibration_error"} == set(row)
        assert f"{row['accuracy']:.4f}" in done.stdout
    assert results["cyclic"]["n"] == 324 and results["held_out"]["n"] >= 12
    assert (folder / "training_curves.png").stat().st_size > 10_000
    assert (folder / "embeddings.png").stat().st_size > 10_000
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments["value_head_dim"] == 4 and arguments["resolved"]["steps"] == 6
    assert arguments["resolved"]["deepspeed_config"]["gradient_accumulation_steps"] == 2
    summaries = json.loads((folder / "data_summary.json").read_text())
    assert [s["name"] for s in summaries] == ["train", "cyclic", "held_out"] and summaries[0]["comparisons"] == 48
    assert list(folder.glob("wandb/offline-run-*"))
    assert not list(folder.glob(".writing*"))


def test_checkpoints_and_best_models_are_pruned(finished):
    folder, _ = finished
    assert sorted(path.name for path in (folder / "checkpoint").glob("step_*")) == ["step_4", "step_6"]
    assert (folder / "checkpoint" / "latest").read_text().strip() == "step_6"
    best = json.loads((folder / "best" / "best.json").read_text())
    assert [entry["loss"] for entry in best] == sorted(entry["loss"] for entry in best)
    assert {entry["model"] for entry in best} == {"step_3", "step_6"}
    for entry in best:
        RewardModel.from_pretrained(str(folder / "best" / entry["model"]))


def test_the_saved_model_scores_as_it_was_evaluated(finished, base):
    from general_preference import preference_score
    from general_preference.datasets.packing import Comparisons
    from general_preference.datasets.preparation import load_tokenized
    from general_preference.datasets.sources import parse_sources
    from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer

    folder, _ = finished
    model = RewardModel.from_pretrained(str(folder))
    assert (model.preference.head, model.preference.dim, model.preference.max_length) == ("gpm", 4, 256)
    encoder = ComparisonTokenizer(load_tokenizer(str(folder)), model.preference.max_length)
    (table,), _ = load_tokenized(parse_sources(str(ROOT / "data/cyclic/test.jsonl")), encoder)
    comparisons = Comparisons(table)
    batch = Collator(0, RowLayout())([comparisons[index, 1.0] for index in range(len(comparisons))])
    with torch.no_grad():
        output = model(**batch.model_inputs())
    score = preference_score(
        output["embeddings"][batch.first], output["embeddings"][batch.second], output["gates"][batch.comparison_index]
    )
    reported = json.loads((folder / "eval_metrics.json").read_text())["cyclic"]
    assert (score > 0).double().mean().item() == pytest.approx(reported["accuracy"])
    assert score.double().mean().item() == pytest.approx(reported["margin"], abs=1e-6)


@pytest.fixture(scope="module")
def partitioned(base, tmp_path_factory):
    """The same run on two processes under ZeRO 3, evaluated after every step, of which the two best models are kept."""
    folder = tmp_path_factory.mktemp("two") / "model"
    flags = ["--zero_stage", "3", "--accumulated_gradient", "1", "--add_pretrain_loss", "--save_best_model", "2"]
    train(base, folder, *flags, "--eval_steps", "1", processes=2)
    return folder


def test_two_processes_and_zero3_learn_the_same(finished, partitioned):
    first, second = (
        [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]
        for folder in (finished[0], partitioned)
    )
    assert second == pytest.approx(first, rel=1e-3)
    one, two = (json.loads((folder / "eval_metrics.json").read_text()) for folder in (finished[0], partitioned))
    assert two["cyclic"]["loss"] == pytest.approx(one["cyclic"]["loss"], rel=1e-2)
    loaded = RewardModel.from_pretrained(str(partitioned)).state_dict()
    expected = RewardModel.from_pretrained(str(finished[0])).state_dict()
    assert all(loaded[name].shape == expected[name].shape for name in expected)


def test_the_best_of_all_evaluations_stay_under_zero3(partitioned):
    losses = []
    for row in read_metrics(partitioned / "metrics.jsonl"):
        sets = [key.split("/")[1] for key in row if key.startswith("eval/") and key.endswith("/n")]
        if sets:
            counts = [row[f"eval/{name}/n"] for name in sets]
            total = sum(row[f"eval/{name}/loss"] * count for name, count in zip(sets, counts, strict=True))
            losses.append((total / sum(counts), f"step_{row['step']}"))
    assert len(losses) == 6
    best = json.loads((partitioned / "best" / "best.json").read_text())
    assert [(entry["loss"], entry["model"]) for entry in best] == sorted(losses)[:2]
    kept = {path.name for path in (partitioned / "best").glob("step_*")}
    assert kept == {name for _, name in sorted(losses)[:2]}
    weights = [RewardModel.from_pretrained(str(partitioned / "best" / name)).value_head.weight for name in sorted(kept)]
    assert not torch.equal(*weights), "two different models"


def test_a_killed_run_continues_where_it_was(finished, base, tmp_path):
    flags = ["--save_steps", "2", "--add_pretrain_loss", "--load_checkpoint"]
    folder = tmp_path / "killed"
    log = tmp_path / "log"
    process = fork([SCRIPT, *base, "--save_path", str(folder), *flags], environment(), log, log)
    while not (folder / "checkpoint" / "latest").is_file() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was still running"
    done = train(base, folder, *flags)
    assert "continuing from" in done.stderr
    whole, resumed = (
        [(row["step"], row["train/loss"]) for row in read_metrics(path / "metrics.jsonl") if "train/loss" in row]
        for path in (finished[0], folder)
    )
    assert resumed == whole


BAD_INPUT = {
    "missing file": (["--dataset", "/nowhere/x.jsonl"], "does not exist"),
    "empty file": (["--dataset", "{tmp}/empty.jsonl"], "holds no records"),
    "not JSON": (["--dataset", "{tmp}/bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    "missing key": (["--dataset", "{tmp}/key.jsonl"], "key.jsonl, line 1: no key 'rejected'"),
    "not text": (["--dataset", "{tmp}/number.jsonl"], "'chosen' is int 5"),
    "probabilities": (["--dataset_probs", "0.5"], "dataset_probs has 1 numbers, but dataset has 2"),
    "odd dimension": (["--value_head_dim", "3"], "even value_head_dim"),
    "gate on BT": (["--is_general_preference", "false", "--value_head_dim", "1"], "Bradley-Terry"),
    "bf16": (["--bf16"], "no bfloat16"),
    "unwritable": (["--save_path", "{tmp}/file/run"], "cannot be written"),
    "unwritable checkpoints": (["--save_steps", "1", "--ckpt_path", "{tmp}/file"], "--ckpt_path"),
    "no model": (["--pretrain", "{tmp}/nothing"], "no config.json"),
    "no such model": (["--pretrain", "/nowhere/model"], "does not exist"),
    "flash": (["--flash_attn"], "computes in half precision: add --bf16"),
    "balance of a dense model": (["--aux_loss_coef", "0.1"], "llama records no choice of experts"),
    "no data flag": (["--dataset", ""], "--dataset is missing"),
    "no configuration": (["--deepspeed_config", "/nowhere/zero.json"], "zero.json cannot be read"),
    "stage twice": (["--deepspeed_config", "{tmp}/stage.json"], "stage = 3, but zero_stage is 2"),
    "unknown to DeepSpeed": (["--deepspeed_config", "{tmp}/unknown.json"], "DeepSpeed (stage3_foo: Extra inputs"),
    "bad eval set": (["--eval_dataset", "x={tmp}/bad.jsonl"], "line 2: not JSON"),
}


def test_bad_input_ends_with_code_2_and_one_line(base, tmp_path):
    """All cases in one process, each through the script's main."""
    good = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(good + "{oops\n")
    (tmp_path / "key.jsonl").write_text('{"prompt": "q", "chosen": "a"}\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": "q", "chosen": 5, "rejected": "b"}\n')
    (tmp_path / "stage.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "unknown.json").write_text('{"zero_optimization": {"stage3_foo": 1}}')
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("in the way")
    cases = {name: [flag.format(tmp=tmp_path) for flag in flags] for name, (flags, _) in BAD_INPUT.items()}
    results = run_cases([*base, "--save_path", str(tmp_path / "run")], cases, tmp_path)
    for name, (_, message) in BAD_INPUT.items():
        code, said = results[name]
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1, (name, said)
        assert message in errors[0], (name, said)
        assert "Traceback" not in said
    left = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert left <= {".lock"}, "no half-written result"


def test_bad_input_on_two_processes_is_said_once(base, tmp_path):
    done = launch(2, SCRIPT, *base, "--save_path", str(tmp_path / "run"), "--dataset", "/nowhere/x.jsonl")
    assert done.returncode == 2
    assert done.stderr.count("error: dataset /nowhere/x.jsonl does not exist") == 1
    assert "Traceback" not in done.stderr


def test_two_runs_cannot_share_a_folder_and_nan_stops_a_run(base, tmp_path, model_folder):
    """A learning rate that explodes; meanwhile a second run tries the same folder."""
    folder = tmp_path / "run"
    command, log = (
        [SCRIPT, *base, "--save_path", str(folder), "--learning_rate", "1e30", "--max_norm", "0"],
        tmp_path / "log",
    )
    first = fork(command, environment(), log, log)
    while not (folder / ".lock").is_file() and first.is_alive():
        time.sleep(0.01)
    import fcntl

    from general_preference.errors import InputError
    from general_preference.files import lock_folder

    time.sleep(0.2)
    with pytest.raises(InputError, match="being written by another run"):
        lock_folder(folder, "--save_path")
    first.join(300)
    said = log.read_text()
    assert first.exitcode == 1
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "not finite at step" in line and "/train.jsonl, line " in line
    assert "Traceback" not in said and not (folder / "config.json").exists()
    fcntl.flock(lock_folder(folder, "--save_path"), fcntl.LOCK_UN)  # the folder is free again
