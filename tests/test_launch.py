"""scripts/launch.py: exit codes, signals and restarts. Starts cost seconds, so each test tells much."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[1] / "scripts" / "launch.py"
pytestmark = pytest.mark.timeout(60)
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
rank, here, again = int(os.environ["RANK"]), Path(__file__).parent, os.environ["TORCHELASTIC_RESTART_COUNT"]
"""


def start(folder: Path, code: str, *options: str) -> subprocess.Popen:
    """The launcher over a script of these lines, which know `rank`, `here` and `again`."""
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
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"no {paths}"
        time.sleep(0.02)


def test_the_first_failure_is_the_exit_code(tmp_path):
    code = "time.sleep(0 if rank == 1 else 20); sys.exit(2 if rank == 1 else 9)"
    process = start(tmp_path, code, "--nproc-per-node", "2")
    assert process.communicate() == ("", "") and process.returncode == 2


def test_a_killed_process_is_named(tmp_path):
    code = "rank == 1 and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.02); sys.exit(1)"
    process = start(tmp_path, code, "--nproc-per-node", "2")
    assert process.communicate()[1] == "error: process 1 was ended by SIGKILL\n" and process.returncode == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_and_have_no_limit(tmp_path, number):
    code = """
def stop(number, frame):
    with (here / f"told{rank}").open("a") as file:
        file.write(f"{number} ")
    time.sleep(rank)                     # one saves for longer than the other
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
(here / f"ready{rank}").write_text("")
time.sleep(60)
"""
    process = start(tmp_path, code, "--nproc-per-node", "2", "--max-restarts", "1")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(number)
    assert process.communicate()[1] == "" and process.returncode == 128 + number
    assert [(tmp_path / f"told{rank}").read_text().split() for rank in range(2)] == [[str(int(number))]] * 2


def test_a_second_signal_is_handed_on_too(tmp_path):
    code = """
def stop(number, frame):
    if (here / "told").exists():
        os._exit(128 + number)
    (here / "told").write_text("")
signal.signal(signal.SIGTERM, stop)
(here / "ready0").write_text("")
while True:
    time.sleep(0.1)
"""
    process = start(tmp_path, code, "--nproc-per-node", "1")
    wait_for(tmp_path / "ready0")
    process.terminate()
    wait_for(tmp_path / "told")
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 143


def test_a_failure_starts_all_again_and_the_last_one_counts(tmp_path):
    code = """
with (here / f"start{rank}").open("a") as file:
    file.write(again)
while rank and not ((other := here / "start0").is_file() and other.read_text().endswith(again)):
    time.sleep(0.05)
time.sleep(0 if rank else 20)
sys.exit(1 if again == "0" else 7)
"""
    process = start(tmp_path, code, "--nproc-per-node", "2", "--max-restarts", "1")
    assert process.wait(50) == 7
    assert [(tmp_path / f"start{rank}").read_text() for rank in range(2)] == ["01", "01"]


@pytest.mark.parametrize("code", [2, 143])
def test_what_a_restart_cannot_change_is_final(tmp_path, code):
    lines = f"(here / f'start{{again}}').write_text(''); sys.exit({code})"
    process = start(tmp_path, lines, "--nproc-per-node", "2", "--max-restarts", "3")
    assert process.wait(50) == code and not (tmp_path / "start1").exists()


@pytest.mark.parametrize("is_host", ["true", "false"])
def test_a_node_that_never_comes_ends_the_others(tmp_path, is_host):
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29631", "--rdzv-id", "x"]
    options = ["--nproc-per-node", "1", "--rdzv-conf", f"join_timeout=2,read_timeout=2,is_host={is_host}"]
    process = start(tmp_path, "", *meeting, *options)
    _, said = process.communicate(timeout=40)
    assert said == "error: the nodes did not meet at localhost:29631 in time: did every node start?\n"
    assert process.returncode == 1
