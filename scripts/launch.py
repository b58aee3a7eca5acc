#!/usr/bin/env python3
"""torchrun with the exit code of the first worker that failed, and one line instead of a traceback.

    python scripts/launch.py --nproc-per-node 8 scripts/train_rm_general_preference.py ...     flags are torchrun's

A stopped run may take as long as saving takes (--shutdown-timeout). Exit codes: the worker's (2: what was given cannot
be used), 128 + N for a worker killed by signal N, 143 or 130 after SIGTERM or Ctrl-C, 1 if the nodes do not meet.
"""

import logging
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a paragraph of explanation

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run


def main(argv: list[str]) -> int:
    """Run torchrun in this process; returns the exit code."""
    logging.disable(logging.CRITICAL)  # of this process, not of the workers
    try:
        run(parse_args(["--shutdown-timeout=86400", *argv]))
        return 0
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        # Whoever was killed is the cause of its peers' errors, and torchrun itself ends the peers by SIGTERM.
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        codes = {rank: code if code > 0 else 128 - code for rank, code in codes.items()}
        rank = min(codes, key=lambda rank: (codes[rank] == 143, codes[rank] != 137, codes[rank] < 128))
        code = codes[rank]
        if code != 2:  # every process refuses its input alike, and the first one says why
            sys.stderr.write(f"launch.py: process {rank} ended with exit code {code}\n")
        return code
    except RendezvousError as error:
        sys.stderr.write(f"error: the nodes did not meet in time ({error or type(error).__name__}): did all start?\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
