"""The launchers up to the command that they run: python, deepspeed, srun and scontrol are fakes that print it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from general_preference.alignment.policy_arguments import parse_policy_arguments
from general_preference.trainer.arguments import parse_arguments
from scripts.make_tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[1]
MULTI = ROOT / "scripts" / "run_train_rm_general_preference_multi.sh"
ALIGN = ROOT / "scripts" / "run_align_general_preference.sh"
SINGLE = ROOT / "scripts" / "run_train_rm_general_preference_single.sh"
SET_BY_USERS = """HOSTFILE NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC MICRO_BATCH GLOBAL_BATCH PRETRAIN DATASET
SAVE_PATH RESTARTS JOIN_TIMEOUT LOCAL_ADDR"""
FAKES = {
    "python": 'case $1 in -) cat > /dev/null ;; -P) echo GPUS=0 ;; *) printf "%s\\n" "$*" ;; esac',
    "deepspeed": 'echo "deepspeed $*"',
    "scontrol": '[[ "$*" == "show hostnames n[5-6]" ]] && printf "n5\\nn6\\n"',
    "srun": """
echo "srun $*"
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@"; done""",
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


def flags_of(command: str):
    """What the training script makes of the flags in a command line."""
    return parse_arguments(command.split("train_rm_general_preference.py ")[1].split())


TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
JOIN = "--rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id gpm --rdzv-conf join_timeout=600,read_timeout=600"


def test_each_node_is_started_by_its_numbers(start):
    settings = {"NPROC": "2", "PRETRAIN": "base", "DATASET": "my.jsonl", "GLOBAL_BATCH": "32", "RESTARTS": "3"}
    done = start(MULTI, "--seed", "7", **settings, **TWO)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert f"launch.py --nproc-per-node 2 --max-restarts 3 --nnodes 2 {JOIN},is_host=0 {ROOT}/scripts/train" in command
    # 2 nodes of 2 processes of 2 comparisons: 4 accumulated make 32
    assert option(command, "--micro_train_batch_size") == "2" and option(command, "--accumulated_gradient") == "4"
    assert command.endswith("--seed 7")


def test_one_node_and_several_share_their_settings(start):
    settings = {"NPROC": "4", "PRETRAIN": "base", "DATASET": "my.jsonl"}
    single = start(SINGLE, "--seed", "7", **settings).stdout.splitlines()[-1]
    multi = start(MULTI, "--seed", "7", **settings | {"NPROC": "2"}, **TWO).stdout.splitlines()[-1]
    assert single.split("train_rm_general_preference.py ")[1] == multi.split("train_rm_general_preference.py ")[1]
    assert "launch.py --nproc-per-node 4 --max-restarts 0 " in single
    alone = {"PRETRAIN": "base", "NPROC": "1"}
    assert start(SINGLE, **alone).stdout.startswith(f"{ROOT}/scripts/train"), "one process needs no launcher"
    assert "launch.py --nproc-per-node 1 --max-restarts 2 " in start(SINGLE, **alone, RESTARTS="2").stdout


def test_presets_are_the_tiny_runs_and_the_papers_settings(start):
    tiny = flags_of(start(SINGLE).stdout.splitlines()[-1])
    model, optimizer, output = tiny.model, tiny.optimizer, tiny.output
    assert (model.is_general_preference, model.value_head_dim, model.add_prompt_head) == (True, 4, True)
    assert (model.preference_head, model.general_preference_tau, tiny.data.max_len) == (None, 0.25, 256)
    assert (optimizer.learning_rate, optimizer.max_epochs, optimizer.micro_train_batch_size) == (3e-3, 8, 16)
    assert (output.logging_steps, output.eval_steps, output.save_path) == (10, 152, f"{ROOT}/checkpoint/rm-tiny")
    assert not tiny.engine.bf16 and not tiny.engine.gradient_checkpointing
    bt = flags_of(start(SINGLE, "--preference_head", "bt").stdout.splitlines()[-1])
    assert (bt.model.is_general_preference, bt.model.value_head_dim, bt.model.add_prompt_head) == (False, None, False)
    assert bt.model.general_preference_tau is None and bt.optimizer == optimizer
    paper = flags_of(start(SINGLE, "--learning_rate", "2e-6", PRETRAIN="a/b").stdout.splitlines()[-1])
    assert (paper.model.value_head_dim, paper.model.add_prompt_head, paper.model.general_preference_tau) == (
        6,
        True,
        None,
    )
    assert (paper.optimizer.learning_rate, paper.optimizer.max_epochs, paper.data.max_len) == (2e-6, 2, 2048)
    assert (paper.optimizer.micro_train_batch_size, paper.optimizer.accumulated_gradient) == (2, 16)
    assert paper.engine.gradient_checkpointing and paper.output.save_path == f"{ROOT}/checkpoint/rm-b"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "NNODES is not set"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set"),
        (TWO | {"NODE_RANK": "2"}, "NNODES=2 and NODE_RANK=2 do not fit"),
        (TWO | {"NNODES": "two"}, "NNODES=two"),
        (TWO | {"RESTARTS": "often"}, "RESTARTS=often is no number"),
        (TWO | {"NPROC": "2", "GLOBAL_BATCH": "6", "PRETRAIN": "p"}, "6 is no multiple of MICRO_BATCH=2 times 4"),
        ({"HOSTFILE": "hosts"}, "no line like 'host slots=8'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(start, tmp_path, extra, said):
    (tmp_path / "hosts").write_text("# none\n")
    done = start(MULTI, **extra)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and said in done.stderr


def test_a_hostfile_goes_to_deepspeed(start, tmp_path):
    (tmp_path / "hosts").write_text("# two\na slots=2\nb slots=2")
    done = start(MULTI, "--seed", "7", HOSTFILE="hosts", PRETRAIN="p", MASTER_PORT="29501", SSH_PORT="23")
    assert done.returncode == 0, done.stderr
    options = "--hostfile hosts --master_port 29501 --ssh_port 23"
    assert done.stdout.startswith(f"deepspeed {options} {ROOT}/scripts/train_rm_general_preference.py ")
    assert option(done.stdout, "--accumulated_gradient") == "4" and done.stdout.endswith("--seed 7\n")


def test_a_slurm_allocation_starts_every_node(start):
    allocation = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[5-6]",
        "SLURM_CPUS_ON_NODE": "64",
    }
    done = start(MULTI, "--seed", "7", NPROC="8", PRETRAIN="base", DATASET="my.jsonl", **allocation)
    assert done.returncode == 0, done.stderr
    srun, first, second = done.stdout.splitlines()
    assert srun.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=64 bash")
    for rank, command in enumerate((first, second)):
        assert "--nproc-per-node 8 --max-restarts 0 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint n5:13456" in command
        assert f"is_host={1 - rank}" in command and command.endswith("--seed 7")


LEAVES_ADAPTERS = """case $1 in
-) cat > /dev/null ;;
-P) echo GPUS=0 ;;
*)
  echo "$*"
  while [[ $# -gt 0 && $1 != --save_path ]]; do shift; done
  [[ $# -eq 0 ]] || { mkdir -p "$2" && touch "$2/adapter_config.json"; }
  ;;
esac"""


def test_the_loop_merges_adapters_where_vllm_writes(start, tmp_path):
    """A fake of python that leaves an adapter where it is told to train: what the next stages are told to load."""
    (tmp_path / "bin" / "python").write_text(f"#!/usr/bin/env bash\n{LEAVES_ADAPTERS}\n")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "adapter_config.json").touch()
    given = {"POLICY": "start", "PREFERENCE": "judge", "PROMPTS": "p.jsonl", "EVAL_PROMPTS": "e.jsonl"}
    given |= {"SAVE_PATH": "run", "ITERATIONS": "2"}
    for extra, first, second in (
        ({"GENERATE_PYTHON": "/vllm"}, "run/start/merged", "run/iter_1/merged"),
        ({"GENERATE_PYTHON": ""}, "start", "run/iter_1/policy"),
    ):
        done = start(ALIGN, "--lora_rank", "4", **given, **extra)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if ".py " in line]
        loaded = [option(line, "--policy") for line in lines if "--policy" in line]
        last = second.replace("1", "2")
        assert loaded == [first, first, first, second, second, second, last]
        trained = [line for line in lines if "train_policy" in line]
        assert len(trained) == 2 and all(line.endswith(" --lora_rank 4") for line in trained)
        merged = [line.split("merge_lora.py ")[1].split()[:2] for line in lines if "merge_lora.py" in line]
        pairs = [["start", first], ["run/iter_1/policy", second], ["run/iter_2/policy", last]]
        assert merged == (pairs if extra["GENERATE_PYTHON"] else [])


@pytest.mark.parametrize(
    ("flags", "reference"),
    [("--recipe inpo", "start"), ("--config flags.json", "start"), ("--recipe dpo --reference other", "other")],
)
def test_the_reference_of_all_iterations_is_the_start(start, tmp_path, flags, reference):
    (tmp_path / "flags.json").write_text('{"anchors": "ref=0.3,t=0.7"}')
    given = {"POLICY": "start", "PREFERENCE": "judge", "PROMPTS": "p.jsonl", "EVAL_PROMPTS": "e.jsonl"}
    given |= {"SAVE_PATH": "run", "ITERATIONS": "2", "GENERATE_PYTHON": ""}
    done = start(ALIGN, *flags.replace("flags", str(tmp_path / "flags")).split(), **given)
    assert done.returncode == 0, done.stderr
    trained = [line.split(".py ")[1].split() for line in done.stdout.splitlines() if "train_policy_" in line]
    runs = [parse_policy_arguments(some) for some in trained]
    assert [run.loss.iteration for run in runs] == [1, 2]
    for run in runs:
        run.check()
        assert run.model.anchor_paths["ref"] == reference and "ref" in run.loss.weights()


def test_the_tiny_model_is_left_alone_when_built_again(tmp_path):
    options = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    make_tiny_model(tmp_path / "model", **options)
    before = (tmp_path / "model").stat().st_ino
    make_tiny_model(tmp_path / "model", **options)
    assert (tmp_path / "model").stat().st_ino == before
    make_tiny_model(tmp_path / "model", seed=1, **options)
    assert (tmp_path / "model").stat().st_ino != before


@pytest.mark.parametrize("content", [{"hidden_size": 64, "initializer_range": 0.02}, {"preference": {}}, {}])
def test_the_tiny_model_replaces_no_other_model(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is no tiny model of this script"):
        make_tiny_model(tmp_path, hidden_size=16, num_layers=1, num_heads=2, vocab_size=300)
    assert json.loads((tmp_path / "config.json").read_text()) == content
