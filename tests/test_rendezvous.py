"""How processes find each other: what contradicts ends all of them with the same line, and a lost one is noticed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.rendezvous import find_place, first_host, interface_towards, slurm_place

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(180)

# Forks the processes of each case, which then need no import of their own: {case: [[exit code, what it said], ...]}.
CODE = """
import json, os, signal, socket, sys, tempfile, time
from general_preference import heartbeat
from general_preference.errors import InputError
from general_preference.distributed import DistributedContext

heartbeat.GRACE = 1.0

def process(rank, world_size, port, act, **extra):
    output = tempfile.NamedTemporaryFile("w+")
    pid = os.fork()
    if pid:
        return pid, output
    os.dup2(output.fileno(), 2)
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in (place | extra).items()})
    code = 0
    try:
        began = time.monotonic()
        with DistributedContext.join(timeout=20, join_timeout=3) as processes:
            act(processes)
    except InputError as error:
        code = 2
        sys.stderr.write(str(error))
    sys.stderr.flush()
    os._exit(code)

def watched(processes):
    processes.heartbeat = heartbeat.Heartbeat(processes)
    processes.barrier()

def killed(processes):
    watched(processes)
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(20)

def ends_early(processes):
    watched(processes)
    if processes.rank != 1:
        processes.heartbeat.closing.wait(2)

nothing = lambda processes: processes.gather_objects(processes.rank)
taken = socket.create_server(("", 0))
CASES = {
    "fine": lambda port: [(rank, 3, port, nothing) for rank in range(3)],
    "disagree": lambda port: [(0, 2, port, nothing), (1, 3, port, nothing)],
    "twice": lambda port: [(0, 3, port, nothing), (1, 3, port, nothing), (1, 3, port, nothing)],
    "two mains": lambda port: [(0, 2, port, nothing), (0, 2, port, nothing)],
    "missing": lambda port: [(0, 3, port, nothing), (2, 3, port, nothing)],
    "no main": lambda port: [(1, 2, port, nothing)],
    "taken": lambda port: [(0, 2, taken.getsockname()[1], nothing)],
    "killed": lambda port: [(rank, 3, port, killed) for rank in range(3)],
    "normal end": lambda port: [(rank, 3, port, ends_early) for rank in range(3)],
}
found = {}
for name, case in CASES.items():
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    started = [process(*arguments) for arguments in case(port)]
    found[name] = []
    for pid, output in started:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        found[name].append([code, output.read()])
    found[name + " seconds"] = time.monotonic() - began
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def cases():
    """{case: [[exit code, stderr] of each process], case + " seconds": duration}."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_processes_that_agree_join_without_a_word(cases):
    assert cases["fine"] == [[0, ""]] * 3


def test_disagreeing_counts_end_every_process(cases):
    codes, said = zip(*cases["disagree"], strict=True)
    assert codes == (2, 2) and said[0] == said[1]
    assert "some count" in said[0] and {"2", "3"} <= set(said[0].split()) and "NNODES" in said[0]
    assert cases["disagree seconds"] < 3


def test_a_rank_given_twice_is_named(cases):
    assert [code for code, _ in cases["twice"]] == [2, 2, 2]
    assert all("two processes" in said and "rank 1" in said for _, said in cases["twice"])
    # On one host the second process 0 finds the port taken, or the first finds a second in its store.
    assert [code for code, _ in cases["two mains"]] == [2, 2]


def test_a_process_that_never_comes_is_named(cases):
    for code, said in cases["missing"]:
        assert code == 2 and "process 1 of 3 did not come to 127.0.0.1:" in said and "3 seconds" in said
    assert cases["missing seconds"] < 10


def test_an_unreachable_main_process_is_named(cases):
    ((code, said),) = cases["no main"]
    assert code == 2 and "nobody answers at MASTER_ADDR=127.0.0.1" in said and "3 seconds" in said
    assert cases["no main seconds"] < 10


def test_a_taken_port_is_named(cases):
    ((code, said),) = cases["taken"]
    assert code == 2 and "MASTER_PORT=" in said and "is taken" in said


def test_a_killed_process_ends_the_others(cases):
    first, second, third = cases["killed"]
    assert second == [-9, ""] and first[0] == third[0] == 1
    assert first[1] == "error: process 1 is gone (its node, the process or the network): process 0 ends\n"
    assert third[1] == "error: process 1 is gone (its node, the process or the network): process 2 ends\n"


def test_a_normal_end_is_no_loss(cases):
    assert cases["normal end"] == [[0, ""]] * 3


def test_without_a_launcher_the_world_is_one(monkeypatch, own_environment):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    with DistributedContext.join() as processes:
        assert processes.world_size == 1 and processes.is_main and processes.heartbeat is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("extra", "said"),
    [({"RANK": "x"}, "RANK=x"), ({"RANK": "4"}, "RANK=4"), ({"MASTER_PORT": "ssh"}, "MASTER_PORT=ssh")],
)
def test_unusable_places_are_named(monkeypatch, extra, said):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (place | extra).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        find_place()


STEP = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


def test_a_slurm_step_of_several_tasks_is_a_world():
    assert slurm_place(STEP) == {
        "PLACED_BY": "slurm", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "13456",
    }  # fmt: skip
    own = slurm_place(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "CUDA_VISIBLE_DEVICES": "0"})
    assert (own["MASTER_ADDR"], own["MASTER_PORT"], own["LOCAL_RANK"]) == ("10.0.0.1", "29500", "0")


def test_a_batch_script_or_a_single_task_is_no_step():
    batch = {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_NTASKS": "8"}
    assert (
        slurm_place(batch) == {} and slurm_place(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {} and slurm_place({}) == {}
    )


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("gpu[003-006,9],other", "gpu003"), ("a", "a"), ("a,b", "a"), ("r[1-2]n[05,07-9]", "r1n05"), ("x[4,6]", "x4")],
)
def test_the_first_host_of_a_slurm_list(nodelist, first):
    assert first_host(nodelist) == first


def test_the_loopback_is_no_interface_towards_another_node():
    assert interface_towards("127.0.0.1") != "lo"
