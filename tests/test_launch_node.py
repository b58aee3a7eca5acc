"""The launcher of one node: what its processes are told, and how they and it end."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[1] / "scripts" / "launch_node.py"
pytestmark = pytest.mark.timeout(60)
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
rank, here = int(os.environ["RANK"]), Path(__file__).parent
(here / f"pid{rank}").write_text(str(os.getpid()))
"""


def start(folder: Path, code: str, *options: str) -> subprocess.Popen:
    """The launcher over a script of these lines, which know `rank` and `here`."""
    script = folder / "script.py"
    script.write_text(PREAMBLE + code)
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *options, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(*paths: Path) -> None:
    """Until the processes have written these files."""
    end = time.monotonic() + 20
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, f"no {paths}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_every_process_knows_its_place(tmp_path, monkeypatch):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    names.append("CUDA_VISIBLE_DEVICES")
    code = f"import json\n(here / f'env{{rank}}').write_text(json.dumps([os.environ.get(name) for name in {names}]))"
    place = ["--nnodes", "3", "--node_rank", "1", "--master_addr", "somewhere", "--master_port", "1234"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert start(tmp_path, code, "--nproc", "2", *place).wait() == 0
    for rank, local_rank in (("2", "0"), ("3", "1")):
        found = json.loads((tmp_path / f"env{rank}").read_text())
        assert found == [rank, local_rank, "6", "2", "somewhere", "1234", "5,7"]


def test_the_first_failure_is_the_exit_code(tmp_path):
    code = "time.sleep(0 if rank == 1 else 0.5); sys.exit({0: 0, 1: 7, 2: 9}[rank])"
    process = start(tmp_path, code, "--nproc", "3")
    _, said = process.communicate()
    assert process.returncode == 7
    assert said == "launch_node.py: process 1 ended with exit code 7\n"


def test_refused_input_passes_through_without_a_word(tmp_path):
    process = start(tmp_path, "sys.exit(2)", "--nproc", "2")
    assert process.communicate()[1] == "" and process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_and_have_no_limit(tmp_path, number):
    code = """
def stop(number, frame):
    (here / f"told{rank}").write_text(str(number))
    time.sleep(rank)                     # one saves for longer than the other
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
(here / f"ready{rank}").write_text("1")
time.sleep(60)
"""
    process = start(tmp_path, code, "--nproc", "2")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(number)
    assert process.communicate()[1] == ""
    assert process.returncode == 128 + number
    assert [(tmp_path / f"told{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_a_second_signal_is_handed_on_too(tmp_path):
    code = """
signal.signal(signal.SIGTERM, lambda *_: (here / f"told{rank}").write_text("1"))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
(here / f"ready{rank}").write_text("1")
time.sleep(60)
"""
    process = start(tmp_path, code, "--nproc", "1")
    wait_for(tmp_path / "ready0")
    process.terminate()
    wait_for(tmp_path / "told0")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130


def test_processes_without_a_handler_end_by_the_signal(tmp_path):
    process = start(tmp_path, "time.sleep(60)", "--nproc", "2")
    wait_for(tmp_path / "pid0", tmp_path / "pid1")
    process.terminate()
    assert process.wait() == 143


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl")
def test_nothing_outlives_a_killed_launcher(tmp_path):
    process = start(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "--nproc", "2")
    wait_for(tmp_path / "pid0", tmp_path / "pid1")
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_process_left_hanging_is_ended(tmp_path):
    code = """
if rank == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / "ready").write_text("1")
    time.sleep(60)
while not (here / "ready").exists():
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""
    shortened = tmp_path / "launcher.py"
    text = LAUNCHER.read_text()
    assert "TIME_TO_NOTICE, TIME_TO_END, LOOK_EVERY = 5.0, 20.0, 0.05" in text
    shortened.write_text(text.replace("= 5.0, 20.0, 0.05", "= 0.3, 0.5, 0.05"))
    (tmp_path / "script.py").write_text(PREAMBLE + code)
    done = subprocess.run(
        [sys.executable, str(shortened), "--nproc", "2", str(tmp_path / "script.py")], capture_output=True, text=True
    )
    assert done.returncode == 137
    assert done.stderr.splitlines() == [
        "launch_node.py: process 0 ended with exit code 137",
        "launch_node.py: ending process 1 after another one's failure (SIGTERM)",
        "launch_node.py: ending process 1 after another one's failure (SIGKILL)",
    ]


@pytest.mark.parametrize(
    "options", ["--nproc 0", "--nproc 1 --nnodes 2", "--nproc 1 --nnodes 2 --node_rank 2", "--nproc x"]
)
def test_unusable_options_are_refused(tmp_path, options):
    process = start(tmp_path, "", *options.split())
    assert "error" in process.communicate()[1] and process.returncode == 2
