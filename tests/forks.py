"""Scripts in forks of one process that has imported everything: that takes seven seconds of CPU, a fork nearly none.

A fork is a process of its own: it gets signals, is killed, ends with a code. What belongs to a start of Python (the
launchers, what libraries read from the environment as they load, another hash seed) needs one: `launch` in
tests/test_training.py.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "deepspeed.runtime.zero.muon.muon_optimizer", "peft", "transformers.trainer",
    "general_preference.alignment.objective", "general_preference.trainer.trainer", "matplotlib.pyplot",
    "scripts.compare_policies", "scripts.generate_responses", "scripts.score_responses",
    "scripts.train_policy_general_preference", "scripts.train_rm_general_preference",
])  # fmt: skip


def fork(command: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> multiprocessing.Process:
    """Start the script command[0] with its flags in the checkout; what it prints is added to the two files."""
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=_become, args=(command, dict(environment), os.getcwd(), str(stdout), str(stderr)))
    process.start()
    return process


def _become(command: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    """In the fork: what a start of Python with `command` would be."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def fork_group(count: int, command: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> list:
    """`command` in `count` forks that find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [fork(command, environment | rank, stdout, stderr) for rank in ranks]


def run_forks(count: int, command: list[str], environment: dict[str, str]) -> CompletedProcess:
    """`command` in one fork or in a group of them, ended; the code is the first that is not 0."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        start = (command, environment, out, err)
        processes = fork_group(count, *start) if count > 1 else [fork(*start)]
        for process in processes:
            process.join(550)
            process.kill()
            process.join()
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return CompletedProcess(command, code, out.read_text(), err.read_text())
