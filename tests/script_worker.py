"""Run by tests in a process of its own: the training script's main, once for each case; starting costs many seconds.

    python tests/script_worker.py JOB.json     JOB: {"base": [flags], "cases": {name: [flags]}}

Prints {name: [exit code, what was written to the terminal]} as its last line.
"""

import contextlib
import io
import json
import logging
import sys
from pathlib import Path

import torch

from general_preference.distributed import DistributedContext
from scripts.train_rm_general_preference import main

torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False  # the same on every machine
DistributedContext.close = lambda self: None  # DeepSpeed keeps groups of the first case, which would end with it
job, results = json.loads(Path(sys.argv[1]).read_text()), {}
for name, flags in job["cases"].items():
    out = io.StringIO()
    for handler in logging.getLogger().handlers[:]:  # made by the case before, on its own stream
        logging.getLogger().removeHandler(handler)
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        code = main(job["base"] + flags)
    results[name] = [code, out.getvalue()]
print(json.dumps(results))
