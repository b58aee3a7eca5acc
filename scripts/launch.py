"""torchrun (same options) that ends with the exit code of the first process that failed, without its own messages.

Signals reach all processes, which end when they have saved; they and refused input (exit code 2) restart nothing.
"""

import logging
import os
import signal
import sys

os.environ |= {"TORCH_CPP_LOG_LEVEL": "FATAL", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # quiet; a store per start

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
    launcher.api.LocalElasticAgent = Agent
    logging.disable(logging.ERROR)  # what torchrun says beside its processes
    options = run.parse_args(["--shutdown-timeout=86400", "--monitor-interval=0.1", *argv])
    try:
        run.run(options)
    except ChildFailedError as error:  # a killed process makes others fail, and torchrun ends the rest by SIGTERM
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank, code = min(codes.items(), key=lambda end: (end[1] in (-15, 143), end[1] > 0, end[0]))
        if code < 0:
            sys.stderr.write(f"error: process {rank} was ended by {signal.Signals(-code).name}\n")
        return code if code > 0 else 128 - code
    except SignalException as stop:
        return 128 + stop.sigval
    except RendezvousError:
        sys.exit(f"error: the nodes did not meet at {options.rdzv_endpoint} in time: did every node start?")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
