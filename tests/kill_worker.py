"""Run by tests in a process of its own: scripts with everything imported once, each in a fork that kills itself.

    python tests/kill_worker.py JOB.json     JOB: [[script, [flags], kill], ...]

kill is null; a number: SIGKILL before the row of that number is written; or a pattern: SIGKILL as a file whose path it
matches is opened to be written or gets its name. Prints [[exit code, what the terminal got], ...] as its last line.
"""

import fnmatch
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from general_preference.inference.batch import ResultStore

job = json.loads(Path(sys.argv[1]).read_text())
mains = {script: importlib.import_module(f"scripts.{script}").main for script, *_ in job}
for module in ("general_preference.trainer.trainer", "general_preference.alignment.objective", "deepspeed", "peft"):
    importlib.import_module(module)


def die() -> None:
    """As kill -9 from outside: nothing is flushed, nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_row(number: int) -> None:
    """Before so many rows are on disk."""
    append, written = ResultStore.append, []

    def counted(store, index, row):
        if len(written) == number - 1:
            die()
        written.append(index)
        append(store, index, row)

    ResultStore.append = counted


def die_at_file(pattern: str) -> None:
    """When a file is opened to be written or given its name."""

    def hook(event, arguments):
        named = {"open": 0, "os.rename": 1}.get(event)
        reads = event == "open" and isinstance(arguments[1], str) and arguments[1].startswith("r")
        if named is not None and not reads and fnmatch.fnmatch(os.fsdecode(str(arguments[named])), pattern):
            die()

    sys.addaudithook(hook)


results = []
for script, flags, kill in job:
    with tempfile.TemporaryFile() as terminal:
        if (child := os.fork()) == 0:
            os.dup2(terminal.fileno(), 1)
            os.dup2(terminal.fileno(), 2)
            if kill is not None:
                (die_at_row if isinstance(kill, int) else die_at_file)(kill)
            code = mains[script](flags)
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        terminal.seek(0)
        results.append([os.waitstatus_to_exitcode(status), terminal.read().decode()])
print(json.dumps(results))
