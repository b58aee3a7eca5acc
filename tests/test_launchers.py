"""The launchers up to the command that they run: python, deepspeed, srun, ssh and others are fakes that print it."""

import os
import subprocess
from pathlib import Path

import pytest

from scripts.make_tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[1]
MULTI = ROOT / "scripts" / "run_train_rm_general_preference_multi.sh"
SINGLE = ROOT / "scripts" / "run_train_rm_general_preference_single.sh"
SET_BY_USERS = (
    "HOSTFILE NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC MICRO_BATCH GLOBAL_BATCH PRETRAIN DATASET SAVE_PATH"
)
FAKES = {
    "python": 'case $1 in -) cat > /dev/null ;; -c) echo 0 ;; *) printf "%s\\n" "$*" ;; esac',
    "deepspeed": 'printf "%s\\n" "$@"; echo "told $(cat "$DS_ENV_FILE")"',
    "pdsh": "exit 9",
    "ssh": 'if [[ " $* " == *" away "* ]]; then echo "no route" >&2; exit 255; fi; bash -c "${@: -1}"',
    "hostname": "echo 10.0.0.7 fe80::1",
    "nvidia-smi": "exit 1",
    "scontrol": '[[ "$*" == "show hostnames n[5-6]" ]] && printf "n5\\nn6\\n"',
    "srun": """
echo "srun $*"
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST='n[5-6]' SLURM_NODEID=$node \\
    SLURM_PROCID=$node "$@"
done""",
}


@pytest.fixture
def start(tmp_path):
    """A function: (script, flags, environment) -> the ended process, run with the fakes."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(script: Path, *flags: str, **extra: str) -> subprocess.CompletedProcess:
        left = {
            name: value
            for name, value in os.environ.items()
            if name not in SET_BY_USERS.split() and not name.startswith("SLURM_")
        }
        environment = left | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)} | extra
        return subprocess.run(
            ["bash", str(script), *flags], env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )

    return run


def option(command: str, name: str) -> str:
    """The value of a flag in a command line."""
    words = command.split()
    return words[words.index(name) + 1]


TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_each_node_is_started_by_its_numbers(start):
    done = start(MULTI, "--seed", "7", NPROC="2", PRETRAIN="base", DATASET="my.jsonl", GLOBAL_BATCH="32", **TWO)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    place = "--nproc 2 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500"
    assert f"launch_node.py {place} {ROOT}/scripts/train_rm_general_preference.py --pretrain base" in command
    # 2 nodes of 2 processes of 2 comparisons: 4 accumulated make 32
    assert option(command, "--micro_train_batch_size") == "2" and option(command, "--accumulated_gradient") == "4"
    assert command.endswith("--seed 7")


def test_one_node_and_several_share_their_settings(start):
    settings = {"NPROC": "4", "PRETRAIN": "base", "DATASET": "my.jsonl"}
    single = start(SINGLE, "--seed", "7", **settings).stdout.splitlines()[-1]
    multi = start(MULTI, "--seed", "7", **settings | {"NPROC": "2"}, **TWO).stdout.splitlines()[-1]
    assert single.split("train_rm_general_preference.py ")[1] == multi.split("train_rm_general_preference.py ")[1]
    assert "--nproc 4" in single


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "HOSTFILE, or NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"),
        ({"NNODES": "2"}, "NODE_RANK is not set"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "NNODES is not set"),
        (TWO | {"NODE_RANK": "2"}, "NODE_RANK=2 must be from 0 to NNODES - 1 = 1"),
        (TWO | {"NNODES": "two"}, "NNODES=two is no number"),
        (TWO | {"MASTER_PORT": "ssh"}, "MASTER_PORT=ssh is no number"),
        (TWO | {"HOSTFILE": "hosts"}, "choose one way"),
        (TWO | {"NPROC": "2", "GLOBAL_BATCH": "6", "PRETRAIN": "p"}, "6 is no multiple of MICRO_BATCH=2 times 4"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(start, extra, said):
    done = start(MULTI, **extra)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and said in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("\n# nobody\n", "names no host"),
        ("a slots=2\nb\n", "line 2 is not 'host slots=NUMBER': b"),
        ("a slots=2\na slots=2\n", "line 2: a comes twice"),
        ("a slots=1\naway slots=1\n", "host away cannot be reached by ssh without a password: no route"),
    ],
)
def test_an_unusable_hostfile_is_named(start, tmp_path, text, said):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    done = start(MULTI, HOSTFILE="hosts")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr


def test_a_hostfile_goes_to_deepspeed_with_what_the_hosts_must_know(start, tmp_path):
    (tmp_path / "hosts").write_text("# two\na slots=2\nb slots=2")
    (tmp_path / ".deepspeed_env").write_text("OWN=1")
    environment = {"OMP_NUM_THREADS": "3", "HF_TOKEN": "secret", "GLOO_SOCKET_IFNAME": "eth7"}
    done = start(
        MULTI, "--input_template", "a $x", "--wandb_group", "(g)", HOSTFILE="hosts", PRETRAIN="p", **environment
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("told ")[0].splitlines()
    for name, value in {"--hostfile": "hosts", "--launcher": "pdsh", "--master_addr": "10.0.0.7"}.items():
        assert words[words.index(name) + 1] == value
    assert words[words.index("--accumulated_gradient") + 1] == "4"
    assert words[words.index("--input_template") + 1] == "a \\$x" and words[-1] == "\\(g\\)"
    told = done.stdout.split("told ")[1].splitlines()
    assert {"OWN=1", "OMP_NUM_THREADS=3", "GLOO_SOCKET_IFNAME=eth7", "DS_ACCELERATOR=cpu"} <= set(told)
    assert "secret" not in done.stdout and all("=" in line for line in told)


def test_a_slurm_allocation_starts_every_node(start):
    allocation = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_ON_NODE": "64",
    }
    done = start(MULTI, "--seed", "7", NPROC="8", PRETRAIN="base", DATASET="my.jsonl", **allocation)
    assert done.returncode == 0, done.stderr
    srun, first, second = done.stdout.splitlines()
    options = "--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=64"
    assert srun.startswith(f"srun {options} bash {MULTI}")
    for rank, command in enumerate((first, second)):
        assert f"--nproc 8 --nnodes 2 --node_rank {rank} --master_addr n5 --master_port 13456" in command
        assert command.endswith("--seed 7")


def test_a_slurm_step_with_a_task_per_device_is_refused(start):
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}
    done = start(MULTI, **step)
    assert done.returncode == 2 and "16 tasks on 2 nodes" in done.stderr


def test_the_tiny_model_is_left_alone_when_built_again(tmp_path):
    options = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    make_tiny_model(tmp_path / "model", **options)
    before = (tmp_path / "model").stat().st_ino
    make_tiny_model(tmp_path / "model", **options)
    assert (tmp_path / "model").stat().st_ino == before
    make_tiny_model(tmp_path / "model", seed=1, **options)
    assert (tmp_path / "model").stat().st_ino != before
