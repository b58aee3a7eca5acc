#!/usr/bin/env python3
"""torchrun that ends with the exit code of the first process that failed, and without torchrun's own messages.

    python scripts/launch.py --nproc-per-node 8 scripts/train_rm_general_preference.py ...

Takes torchrun's options. SIGTERM and SIGINT go to every process, which then may take as long as saving takes; so does a
second one. A failed process ends the others; with --max-restarts N all start again, N times, except after refused input
or a signal. Exit codes: the process's own (2: refused input), 128 + a signal's number, 1 where nodes do not meet.
"""

import logging
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import; torchrun takes over when it starts
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # of this process: no C++ frames when nodes do not meet

from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

FINAL = {2, 128 + signal.SIGINT, 128 + signal.SIGTERM}  # exit codes after which nothing starts again


class Agent(LocalElasticAgent):
    """torchrun's, which knows what a new start cannot change."""

    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        if FINAL & {failure.exitcode for failure in result.failures.values()}:
            self._remaining_restarts = 0
        return result


def main(argv: list[str]) -> int:
    """Run, and turn torchrun's exceptions into exit codes."""
    arguments = run.parse_args(["--shutdown-timeout", "86400", "--monitor-interval", "0.1", *argv])
    processes, cores = run.determine_local_world_size(arguments.nproc_per_node), len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(-(-cores // processes)))
    os.environ.pop("TORCH_CPP_LOG_LEVEL", None)
    api.LocalElasticAgent = Agent
    logging.disable(logging.ERROR)  # what torchrun says beside its processes
    try:
        run.run(arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda failure: failure[1].timestamp)
        # A killed process makes others fail, and torchrun's SIGTERM to the rest is no reason.
        killed = [(rank, end) for rank, end in failures if end.exitcode < 0 and end.exitcode != -signal.SIGTERM]
        rank, end = (killed or failures)[0]
        if end.exitcode < 0:
            sys.stderr.write(f"error: process {rank} was ended by {signal.Signals(-end.exitcode).name}\n")
        return end.exitcode if end.exitcode > 0 else 128 - end.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    except RendezvousError:
        sys.stderr.write(f"error: the nodes did not meet at {arguments.rdzv_endpoint} in time: did every node start?\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
