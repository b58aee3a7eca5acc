"""Signals: what the loader's processes do with them, and how a run takes two of them."""

import functools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from general_preference.cli import exit_code
from general_preference.errors import RunError, Stopped
from general_preference.trainer.stopping import TOGETHER, ignore_signals_in_worker
from tests.test_training import ROOT, environment

INIT = functools.partial(ignore_signals_in_worker, os.getpid())


@pytest.mark.timeout(60)
def test_loader_processes_end_with_the_loader_alone():
    before = {child.pid for child in psutil.Process().children()}
    loader = iter(DataLoader(torch.arange(64), batch_size=1, num_workers=2, worker_init_fn=INIT))
    assert [next(loader).item(), next(loader).item()] == [0, 1], "both are at work"
    workers = [child for child in psutil.Process().children() if child.pid not in before]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        # By another process, as a scheduler does it: the parent's own signal is taken.
        subprocess.run(["kill", f"-{number.value}", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.2)
    assert [batch.item() for batch in loader] == list(range(2, 64))
    del loader
    assert not psutil.wait_procs(workers, timeout=20)[1], "they end with the loader"


@pytest.mark.timeout(60)
def test_a_loaders_process_ends_when_its_parent_says_so():
    loader = iter(DataLoader(torch.arange(64), batch_size=1, num_workers=1, worker_init_fn=INIT))
    next(loader)
    (worker,) = loader._workers
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


CODE = """
import os, signal, sys, time
from general_preference.trainer.stopping import StopRequests

class Alone:
    is_main = True
    all_reduce_max = staticmethod(lambda values: values)

with StopRequests(Alone(), None) as requests:
    print("ready", flush=True)
    if sys.argv[1:]:
        sum(range(2 * 10**8))  # seconds in which no handler runs
    while not requests.agree()[0]:
        time.sleep(0.01)
    print("agreed on", requests.agree()[0], flush=True)
    time.sleep(30)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.send_signal(number)  # of the same ending: launcher and scheduler both say it
    assert process.stdout.readline() == f"agreed on {number}\n"
    time.sleep(TOGETHER + 0.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number
    assert "finishing the step, then saving" in process.stderr.read()


@pytest.mark.timeout(60)
def test_one_order_that_comes_twice_during_a_long_call_is_one():
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "long"], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.stdout.readline() == "agreed on 15\n"
    process.kill()
    process.wait()


def test_exit_codes(capsys):
    def end_by(error):
        def work():
            raise error

        return exit_code(work, kept="what was saved stays")

    assert end_by(Stopped(signal.SIGTERM, "saved at step 3")) == 143
    assert end_by(Stopped(signal.SIGINT)) == 130
    assert end_by(KeyboardInterrupt()) == 130
    assert end_by(RunError("cannot write x")) == 1
    assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5), kept="what was saved stays") == 143
    said = [line for line in capsys.readouterr().err.split("\n") if line]
    assert said == [
        "stopped by SIGTERM; saved at step 3",
        "interrupted; what was saved stays",
        "interrupted; what was saved stays",
        "error: cannot write x",
        "stopped by SIGTERM; what was saved stays",
    ]
