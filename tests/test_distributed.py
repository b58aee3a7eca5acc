"""What several processes tell each other: no failure of one of them stays unsaid, and none of them hangs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from general_preference.cli import exit_code
from general_preference.cpu_settings import CPU_SETTINGS
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError, RunError
from general_preference.files import lock_folder, replace_text

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import sys, time
from pathlib import Path
import torch
from general_preference import cli
from general_preference.errors import InputError, NonFiniteError, RunError
from general_preference.distributed import DistributedContext

cli.PATIENCE = 0.1

def fail(context, kind, rank):
    if context.rank == rank:
        raise kind(28, "No space left on device") if kind is OSError else kind(f"of process {rank}")
    return context.rank

def fine(context):
    assert context.main_process_first(lambda: context.rank) == context.rank
    assert context.main_process_first(lambda: "first", main_only=True) == ("first" if context.is_main else None)
    assert context.gather_objects(context.rank) == [0, 1] and context.broadcast(context.rank) == 0
    assert context.all_reduce(torch.tensor([1.0, context.rank])).tolist() == [2, 1]
    assert context.all_reduce_max(torch.tensor([-1, context.rank])).tolist() == [-1, 1]
    assert context.write(Path("there"), lambda: context.rank) == context.rank
    context.barrier()

def causes(context):
    try:
        context.write(Path("there"), lambda: fail(context, OSError, 1))
    except RunError as error:
        assert isinstance(error.__cause__, OSError) == (context.rank == 1)
        raise

def late(context):
    group = torch.distributed.new_group()
    context.set_timeout(1)
    for each in (group, None):
        began = time.monotonic()
        try:
            if context.is_main:
                torch.distributed.all_reduce(torch.ones(1), group=each)
            else:
                time.sleep(3)
            assert not context.is_main, "the other did not come"
        except RuntimeError:
            assert 0.5 < time.monotonic() - began < 3
            break

with DistributedContext.join() as context:
    for name, work in {
        "fine": lambda: fine(context),
        "first": lambda: context.main_process_first(lambda: fail(context, InputError, 0)),
        "second": lambda: context.together(lambda: fail(context, InputError, 1)),
        "full": lambda: causes(context),
        "alone": lambda: fail(context, NonFiniteError, 1),
        "late": lambda: late(context),
    }.items():
        print(name, cli.exit_code(work, kept=""), flush=True)
"""


@pytest.mark.timeout(180)
def test_every_failure_is_printed_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    # As after a restart of two nodes, of which torchrun counts it on the one alone whose process died.
    common |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RESTART_COUNT": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    (first, said_first), (second, said_second) = (process.communicate(timeout=150) for process in started)
    assert first.split("\n")[:6] == ["fine 0", "first 2", "second 2", "full 1", "alone 0", "late 0"], said_first
    assert second.split("\n")[:6] == ["fine 0", "first 2", "second 2", "full 1", "alone 1", "late 0"], said_second
    errors = [[line for line in said.splitlines() if line.startswith("error")] for said in (said_first, said_second)]
    full = "error: cannot write there: [Errno 28] No space left on device. What was saved before is intact"
    assert errors == [["error: of process 0", "error: of process 1", full], ["error: of process 1"]]


def test_a_world_of_one_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with DistributedContext.join() as context:
        assert context.is_main and context.world_size == 1 and context.local_rank == 0
        assert context.gather_objects("x") == ["x"] and context.broadcast("x") == "x"
        assert context.all_reduce(torch.ones(2)).tolist() == [1, 1]
        context.set_timeout(10)
        with pytest.raises(OSError, match="missing"):  # a fault of ours, not of the disk
            context.main_process_first(lambda: Path("/missing").read_text())
        assert os.environ["WORLD_SIZE"] == "1"
    assert not dist.is_initialized()


def test_ranks_without_an_address_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="MASTER_ADDR"):
        DistributedContext.join()


def test_what_cannot_be_written_is_named_with_its_cause(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/file/x.json: (Not a directory|File exists)") as raised:
        replace_text(tmp_path / "file" / "x.json", "text")
    assert isinstance(raised.value.__cause__, OSError)
    replace_text(tmp_path / "new" / "x.json", "text")
    assert (tmp_path / "new" / "x.json").read_text() == "text\n"


def test_a_folder_is_one_runs(tmp_path):
    lock = lock_folder(tmp_path / "run", "save_path")
    with pytest.raises(InputError, match=r"save_path .* is being written by another run"):
        lock_folder(tmp_path / "run", "save_path")
    lock.close()
    lock_folder(tmp_path / "run", "save_path").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"save_path .* cannot be written"):
        lock_folder(tmp_path / "file", "save_path")


def test_debugging_shows_the_causes(monkeypatch, capsys):
    def work():
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise InputError("one line") from error

    assert exit_code(work, kept="") == 2 and capsys.readouterr().err == "error: one line\n"
    monkeypatch.setenv("GPM_DEBUG", "1")
    assert exit_code(work, kept="") == 2
    shown = capsys.readouterr().err
    assert "KeyError: 'the cause'" in shown and shown.endswith("\nerror: one line\n")
    with pytest.raises(FileNotFoundError):  # a fault of ours keeps its traceback
        exit_code(lambda: Path("/missing").read_text(), kept="")


def test_cpu_settings_hold_however_a_script_is_started():
    code = (
        "import os, sys; from general_preference.cpu_settings import restart_with_cpu_settings as restart; restart();"
        "print(os.getpid(), sys.argv[1:], os.environ['MALLOC_MMAP_THRESHOLD_'], os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in CPU_SETTINGS}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "7"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "a b", ""], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.communicate()[0] == f"{process.pid} ['a b', ''] 4294967296 7\n"
