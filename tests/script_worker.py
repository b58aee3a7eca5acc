"""Run by tests in a process of its own: a training script's main, once for each case; starting costs many seconds.

    python tests/script_worker.py JOB.json     JOB: {"base": [flags], "cases": {name: [flags]}}

JOB may name another "script" than that of reward models, and in "stops" {name: file} the cases that get SIGTERM as soon
as the file has a line. The main process prints {name: [exit code, what was written to the terminal]} as its last line.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from general_preference.distributed import DistributedContext

torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False  # the same on every machine
DistributedContext.close = lambda self: None  # DeepSpeed keeps groups of the first case, which would end with it
job, results = json.loads(Path(sys.argv[1]).read_text()), {}
main = importlib.import_module(f"scripts.{job.get('script', 'train_rm_general_preference')}").main


def stop_once_written(file: Path) -> None:
    """SIGTERM to this process."""
    while not (file.is_file() and file.stat().st_size):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


for name, flags in job["cases"].items():
    out = io.StringIO()
    for handler in logging.getLogger().handlers[:]:  # made by the case before, on its own stream
        logging.getLogger().removeHandler(handler)
    if name in job.get("stops", {}):
        threading.Thread(target=stop_once_written, args=(Path(job["stops"][name]),), daemon=True).start()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        code = main(job["base"] + flags)
    results[name] = [code, out.getvalue()]
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(results))
