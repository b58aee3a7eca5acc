"""What several processes tell each other: no failure of one of them stays unsaid, and none of them hangs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from general_preference.distributed import DistributedContext
from general_preference.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import os, sys
from general_preference.cli import exit_code
from general_preference.errors import InputError, NonFiniteError
from general_preference.distributed import DistributedContext

def fail(processes, kind, rank):
    if processes.rank == rank:
        raise kind(f"of process {rank}")
    return processes.rank

def fine(processes):
    assert processes.main_process_first(lambda: processes.rank) == processes.rank
    assert processes.main_process_first(lambda: "first", main_only=True) == ("first" if processes.is_main else None)
    assert processes.gather_objects(processes.rank) == [0, 1] and processes.broadcast(processes.rank) == 0

with DistributedContext.join() as processes:
    for name, work in {
        "fine": lambda: fine(processes),
        "first": lambda: processes.main_process_first(lambda: fail(processes, InputError, 0)),
        "second": lambda: processes.main_process_first(lambda: fail(processes, InputError, 1)),
        "alone": lambda: fail(processes, NonFiniteError, 1),
    }.items():
        print(name, exit_code(work, kept=""), flush=True)
"""


@pytest.mark.timeout(180)
def test_every_failure_is_printed_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    (first, said_first), (second, said_second) = (process.communicate(timeout=150) for process in started)
    assert first.split("\n")[:4] == ["fine 0", "first 2", "second 2", "alone 0"]
    assert second.split("\n")[:4] == ["fine 0", "first 2", "second 2", "alone 1"]
    errors = [[line for line in said.splitlines() if "error" in line] for said in (said_first, said_second)]
    assert errors == [["error: of process 0", "error: of process 1"], ["error: of process 1"]]


def test_ranks_without_an_address_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="MASTER_ADDR"):
        DistributedContext.join()
