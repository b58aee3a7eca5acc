"""A run that is stopped and continued: other processes and ZeRO stages, signals, damage, full disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from general_preference.trainer import checkpoint
from general_preference.trainer.metrics import MEASURED, read_metrics
from tests.conftest import random_comparisons
from tests.forks import fork
from tests.test_training import GPM, ROOT, SCRIPT, environment, forked, launch, run_cases

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def moved(model_folder, tmp_path_factory):
    """Checkpoints of every ZeRO stage on one and on two processes, each read by others."""
    base = tmp_path_factory.mktemp("moved")
    comparisons = random_comparisons(14, 290, seed=5)
    for comparison in comparisons:
        comparison["length"] = len(comparison["prompt_ids"]) + sum(map(len, comparison["response_ids"]))

    def job(world: int, save: list, load: list) -> dict:
        content = {"pretrain": model_folder("llama"), "comparisons": comparisons, "save": save, "load": load}
        output = base / f"results{len(list(base.glob('*.json')))}.pt"
        content["output"] = str(output)
        path = output.with_suffix(".json")
        path.write_text(json.dumps(content))
        done = forked(world, str(ROOT / "tests" / "checkpoint_worker.py"), str(path))
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(output)

    def saved(world: int, *kinds) -> list[dict]:
        return [
            {"name": f"{world}/{kind}", "folder": str(base / f"on{world}_{kind}"), **divided(kind)} for kind in kinds
        ]

    def divided(kind) -> dict:
        stage, _, more = str(kind).partition("_")
        return {"stage": int(stage), "flags": {"": [], "lora": LORA, "bf16": ["--bf16"]}[more]}

    def loaded(world: int, *pairs) -> list[dict]:
        runs = []
        for writer, stage in pairs:
            folder = str(base / f"on{writer.replace('/', '_')}")
            run = divided(writer[2:]) | {"stage": stage}
            runs.append({"name": f"{writer} -> {world}/{stage}", "folder": folder, **run})
            runs[-1]["persistence"] = 100 if writer.startswith("1") else 0  # ZeRO 3 keeps smaller tensors whole
        return runs

    results = job(2, saved(2, 2, 3), [])
    results |= job(1, saved(1, 0, 2, "3_lora", "0_bf16", "3_bf16"), loaded(1, *pairs_of(1)))
    results |= job(2, [], loaded(2, *pairs_of(2)))
    return results


LORA = ["--lora_rank", "2", "--lora_dropout", "0.1"]
MOVES = [
    "2/3 -> 1/2", "2/2 -> 1/0", "1/0 -> 1/3", "1/2 -> 1/2", "1/0_bf16 -> 1/3", "1/3_bf16 -> 1/2",
    "1/2 -> 2/3", "1/0 -> 2/1", "2/3 -> 2/3", "1/3_lora -> 2/2",
]  # fmt: skip


def pairs_of(world: int) -> list[tuple[str, int]]:
    """(writer, reading ZeRO stage) of the moves to `world` processes."""
    moves = (move.split(" -> ") for move in MOVES)
    return [(writer, int(reader[2:])) for writer, reader in moves if reader.startswith(f"{world}/")]


@pytest.mark.parametrize("move", MOVES)
def test_a_run_moves_to_other_processes_and_stages(moved, move):
    writer, found = moved[move.split(" -> ")[0]], moved[move]
    assert found["step"] == 4 and found["tensors"].keys() == writer["tensors"].keys()
    for name, tensor in writer["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), f"{name} is not what was written"
    assert found["rate"] == pytest.approx(moved["1/2 -> 1/2"]["rate"])
    if "lora" not in move:  # its dropout draws anew on another number of processes
        assert found["after"] == pytest.approx(writer["after"], rel=1e-5)


def test_what_was_trained_goes_on_bit_by_bit(moved):
    assert moved["1/2 -> 1/2"]["after"] == moved["1/2"]["after"]
    assert len({*moved["1/2"]["losses"], *moved["1/2"]["after"]}) == 4, "the steps differ from each other"


def short_run(model: str) -> list[str]:
    """Flags of a run of six steps that saves after 2, 4 and 6, and logs between them."""
    return [
        "--pretrain", model, "--dataset", f"{ROOT}/data/cyclic/train.jsonl", "--max_samples", "30",
        "--train_split_ratio", "0.8", "--max_len", "256", "--learning_rate", "1e-3", "--micro_train_batch_size", "2",
        "--accumulated_gradient", "2", "--eval_steps", "3", "--save_best_model", "1", "--logging_steps", "3",
        "--max_ckpt_num", "5", *GPM,
    ]  # fmt: skip


def rows(folder: Path) -> list[dict]:
    """What was logged, without what is measured with a clock."""
    found = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = launch(1, SCRIPT, *short_run(model_folder("llama")), "--save_path", str(folder), "--save_steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def flip(file: Path, position: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def of_earlier_version(folder: Path) -> None:
    """Make a checkpoint's manifest, with its own checksum, one of the format before this one."""
    content = json.loads((folder / "manifest.json").read_text())
    content |= {"format": checkpoint.FORMAT - 1}
    del content["xxh3_128"]
    (folder / "manifest.json").write_text(json.dumps(content | {"xxh3_128": checkpoint._digest(content)}))


# Changes of a group record that leave its prompt and the number of its tokens as they are.
CHANGES = {
    "moved": lambda record: record,
    "swapped": lambda record: record | {"preferences": [[loser, winner] for winner, loser in record["preferences"]]},
    "soft": lambda record: record | {"preferences": [[*pair, 0.9] for pair in record["preferences"]]},
    "margins": lambda record: record | {"margin": 0.5},
    "reordered": lambda record: record | {"preferences": record["preferences"][::-1]},
    "reworded": lambda record: record | {"responses": [text.replace(".", "!") for text in record["responses"]]},
}


WEIGHTS = "process_00000.safetensors"
# what is done to the checkpoints 2 and 4, further flags, exit code, what is said
HARM = {
    "nothing": (lambda c: None, [], 0, "continuing from {c}/step_4"),
    "no latest": (lambda c: (c / "latest").unlink(), [], 0, "continuing from {c}/step_4"),
    "older latest": (lambda c: (c / "latest").write_text("step_2"), [], 0, "continuing from {c}/step_2"),
    "truncated weights": (
        lambda c: truncate(c / "step_4" / WEIGHTS), [], 0, "step_4 is skipped: process_00000.safetensors has"
    ),
    "flipped bit of the weights": (
        lambda c: flip(c / "step_4" / WEIGHTS, 0.7), [], 0, "step_4 is skipped: process_00000.safetensors is dam"
    ),
    "flipped bit of the manifest": (
        lambda c: flip(c / "step_4" / "manifest.json", 0.5), [], 0, "step_4 is skipped: its manifest.json"
    ),
    "missing weights": (lambda c: (c / "step_4" / WEIGHTS).unlink(), [], 0, "continuing from {c}/step_2"),
    "foreign folder": (lambda c: (c / "step_9").mkdir(), [], 0, "continuing from {c}/step_4"),
    "killed while writing": (
        lambda c: shutil.copytree(c / "step_2", c / ".writing_step_6"), [], 0, "continuing from {c}/step_4"
    ),
    "all damaged": (
        lambda c: [truncate(c / f"step_{n}" / WEIGHTS) for n in (2, 4)], [], 2, "no checkpoint in {c} can be used (st"
    ),
    "another seed": (lambda c: None, ["--seed", "7"], 2, "was made with seed = 42, this run has 7"),
    "another batch": (
        lambda c: None, ["--accumulated_gradient", "1"], 2, "was made with global_batch_size = 4, this run has 2"
    ),
    "another head": (lambda c: None, ["--value_head_dim", "6"], 2, "value_head_dim = 4, this run has 6"),
    "another temperature": (
        lambda c: None, ["--tau", "0.3"], 2, "was made with general_preference_tau = 0.1, this run has 0.3"
    ),
    "other data": (
        lambda c: None, ["--dataset", f"{ROOT}/data/mixed/train.jsonl"], 2, "was made with data_checksum = "
    ),
    "the same data elsewhere": (lambda c: None, ["--dataset", "{moved}"], 0, "continuing from {c}/step_4"),
    **{
        f"{change} data": (lambda c: None, ["--dataset", f"{{{change}}}"], 2, "was made with data_checksum = ")
        for change in list(CHANGES)[1:]
    },
    "an earlier version": (
        lambda c: [of_earlier_version(c / f"step_{n}") for n in (2, 4)], [], 2,
        f"step_4: it has format {checkpoint.FORMAT - 1}, this version reads {checkpoint.FORMAT}",
    ),
    "other adapters": (lambda c: None, ["--lora_rank", "2"], 2, "was made with lora_rank = 0, this run has 2"),
    "another loss": (
        lambda c: None, ["--grad_accum_dtype", "fp32", "--loss", "regression"], 0,
        "grad_accum_dtype is fp32 from here on; it was None until now",
    ),
    "another model": (lambda c: None, ["--pretrain", "{other}"], 2, "was made with pretrain_checksum = "),
    "odd names": (
        lambda c: [(c / "step_²").mkdir(), (c / "step_6").write_text("")], [], 0, "continuing from {c}/step_4"
    ),
    "another learning rate": (
        lambda c: None, ["--learning_rate", "5e-4"], 0, "learning_rate is 0.0005 from here on; it was 0.001 until now"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def continued(whole, model_folder, tmp_path_factory):
    """{case: (folder, exit code, terminal)} of runs continued after every kind of harm, all in one process."""
    base, cases = tmp_path_factory.mktemp("harm"), {}
    data = {name: str(base / f"{name}.jsonl") for name in CHANGES}
    records = list(map(json.loads, (ROOT / "data" / "cyclic" / "train.jsonl").read_text().splitlines()))
    for name, change in CHANGES.items():
        Path(data[name]).write_text("\n".join(json.dumps(change(record)) for record in records))
    for number, (name, (harm, flags, _, _)) in enumerate(HARM.items()):
        folder = base / str(number)
        shutil.copytree(whole, folder)
        checkpoints = folder / "checkpoint"
        shutil.rmtree(checkpoints / "step_6")
        (checkpoints / "latest").write_text("step_4\n")
        harm(checkpoints)
        flags = [flag.format(other=model_folder("gpt2"), **data) for flag in flags]
        cases[name] = ["--save_path", str(folder), "--save_steps", "2", "--load_checkpoint", *flags]
    results = run_cases(short_run(model_folder("llama")), cases, base)
    return {name: (Path(cases[name][1]), *result) for name, result in results.items()}


@pytest.mark.parametrize("case", HARM)
def test_the_newest_whole_checkpoint_is_found(continued, whole, case):
    folder, code, said = continued[case]
    _, flags, expected, message = HARM[case]
    assert code == expected, said
    assert message.format(c=folder / "checkpoint") in said
    assert "Traceback" not in said
    if code == 0 and (not flags or case == "the same data elsewhere"):
        assert rows(folder) == rows(whole)
        assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert json.loads((folder / "best" / "best.json").read_text()) == json.loads(
            (whole / "best/best.json").read_text()
        )
        assert len(list((folder / "best").glob("step_*"))) == 1
        assert (folder / "checkpoint" / "latest").read_text().strip() == "step_6"
        left = {path.name for path in (folder / "checkpoint").iterdir()} - {"step_9", "step_²"}
        assert left == {"latest", "step_2", "step_4", "step_6"}, "nothing half-written stays"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_can_be_continued(model_folder, tmp_path, number):
    """It comes between two log lines; the continued run goes on with the same lines."""
    flags = [*short_run(model_folder("llama")), "--max_epochs", "8", "--eval_steps", "20", "--logging_steps", "7"]
    if number == signal.SIGINT:
        flags += ["--save_minutes", "0.0001"]
    log = tmp_path / "log"
    process = fork([SCRIPT, *flags, "--save_path", str(tmp_path / "run")], environment(), log, log)
    wanted = 7 if number == signal.SIGINT else 1  # saving ends a log window, and it saves after every step
    while process.is_alive() and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < wanted:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(120)
    said = log.read_text()
    assert process.exitcode == 128 + number, said
    assert "saved at step" in said and "Traceback" not in said
    step = int((tmp_path / "run" / "checkpoint" / "latest").read_text().strip().removeprefix("step_"))
    if number == signal.SIGINT:
        assert len(list((tmp_path / "run" / "checkpoint").glob("step_*"))) == 5, (
            "--save_minutes wrote more than the last"
        )
        return
    done = forked(1, SCRIPT, *flags, "--save_path", str(tmp_path / "run"), "--load_checkpoint")
    assert done.returncode == 0 and f"continuing from {tmp_path / 'run'}/checkpoint/step_{step}" in done.stderr
    found = [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert found == sorted({*range(7, 48, 7), 48, step}), "saving ends a log window"
    assert all(0 < row["train/loss"] < 20 for row in rows(tmp_path / "run") if "train/loss" in row)


def test_a_disk_that_refuses_a_checkpoint_leaves_the_last_one(whole, model_folder, tmp_path):
    """A limit on file sizes stands for the full disk; tests/cluster/disks.sh fills a real one."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint" / "step_6")
    before = (folder / "checkpoint" / "step_4" / WEIGHTS).read_bytes()
    limit = len(before) // 2
    (tmp_path / "limited.py").write_text(
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    flags = [*short_run(model_folder("llama")), "--save_path", str(folder), "--save_steps", "2", "--load_checkpoint"]
    done = forked(1, str(tmp_path / "limited.py"), *flags)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert f"cannot write {folder / 'checkpoint'}: " in errors[0], errors
    assert (folder / "checkpoint" / "step_4" / WEIGHTS).read_bytes() == before
    assert not list((folder / "checkpoint").glob(".writing*")) and not (folder / "checkpoint" / "step_6").exists()


def lose_a_process(flags: list[str], folder: Path, lost: int, *options: str) -> subprocess.Popen:
    """Start two processes under the launcher and kill one of them as soon as a checkpoint is there; the launcher."""
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", "2", *options, SCRIPT, *flags]
    with (folder / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, "--micro_train_batch_size", "1", "--save_path", str(folder / "run"), "--save_steps", "2"],
            env=environment(), cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
    while launcher.poll() is None and not (folder / "run" / "checkpoint" / "latest").exists():
        time.sleep(0.05)
    children = psutil.Process(launcher.pid).children()
    next(child for child in children if child.environ().get("RANK") == str(lost)).kill()
    return launcher


def test_a_lost_process_takes_the_other_with_it(model_folder, tmp_path):
    """SIGKILL to one of two: the launcher ends with its code, soon, and names the process; no hang."""
    flags = [*short_run(model_folder("llama")), "--max_epochs", "500", "--eval_steps", "5000", "--logging_steps", "1"]
    launcher = lose_a_process(flags, tmp_path, 0)
    began = time.monotonic()
    assert launcher.wait(timeout=60) == 128 + signal.SIGKILL and time.monotonic() - began < 60
    said = (tmp_path / "log").read_text()
    assert "error: process 0 was ended by SIGKILL" in said and "torch/distributed/run.py" not in said


def test_a_group_that_lost_a_process_restarts_and_ends_as_if_it_had_not(model_folder, tmp_path):
    """One of two is killed by -9; with a restart allowed the run continues by itself from its newest checkpoint."""
    flags = [*short_run(model_folder("llama")), "--max_epochs", "4", "--logging_steps", "1"]
    for name in ("whole", "restarted"):
        (tmp_path / name).mkdir()
    done = forked(2, SCRIPT, *flags, "--micro_train_batch_size", "1", "--save_steps", "2",
                  "--save_path", str(tmp_path / "whole" / "run"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    launcher = lose_a_process(flags, tmp_path / "restarted", 1, "--max-restarts", "1")
    assert launcher.wait(timeout=200) == 0
    said = (tmp_path / "restarted" / "log").read_text()
    assert "continuing from" in said
    assert rows(tmp_path / "restarted" / "run") == rows(tmp_path / "whole" / "run")


def test_a_restart_needs_a_folder_without_an_earlier_runs_checkpoints(whole, model_folder):
    """Refused input is not started again: the second start would take those checkpoints for its own."""
    start = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", "1", "--max-restarts", "1"]
    command = [*start, SCRIPT, *short_run(model_folder("llama")), "--save_path", str(whole)]
    again = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and again.stderr.count("holds checkpoints of an earlier run") == 1
