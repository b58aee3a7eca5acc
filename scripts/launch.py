#!/usr/bin/env python3
"""torchrun that ends with the exit code of the first process that failed, without torchrun's own messages.

    python scripts/launch.py --nproc-per-node 8 scripts/train_rm_general_preference.py ...       options are torchrun's

SIGTERM and SIGINT go to every process, which then may take as long as saving takes. Nothing restarts after refused
input or a signal. Exit codes: the process's own, 128 + a signal's number, 1 where nodes do not meet.
"""

import logging
import os
import signal
import sys

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # of this process: no C++ frames when nodes do not meet

from torch.distributed import launcher, run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

del os.environ["TORCH_CPP_LOG_LEVEL"]


class Agent(LocalElasticAgent):
    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in (2, 130, 143) for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main(argv: list[str]) -> int:
    """Run, and turn torchrun's exceptions into exit codes."""
    launcher.api.LocalElasticAgent = Agent
    logging.disable(logging.ERROR)  # what torchrun says beside its processes
    options = run.parse_args(["--shutdown-timeout=86400", "--monitor-interval=0.1", *argv])
    try:
        run.run(options)
        return 0
    except ChildFailedError as error:  # a killed process makes others fail, and torchrun ends the rest by SIGTERM
        ends = sorted((end.exitcode in (-15, 143), end.exitcode > 0, rank) for rank, end in error.failures.items())
        code = error.failures[rank := ends[0][2]].exitcode
        if code < 0:
            sys.stderr.write(f"error: process {rank} was ended by {signal.Signals(-code).name}\n")
        return code if code > 0 else 128 - code
    except SignalException as stop:
        return 128 + stop.sigval
    except RendezvousError:
        sys.stderr.write(f"error: the nodes did not meet at {options.rdzv_endpoint} in time: did every node start?\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
