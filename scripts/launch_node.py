#!/usr/bin/env python3
"""Start one process per device of this node, hand them signals, and end with their exit code. Standard library only.

    python scripts/launch_node.py --nproc 8 scripts/train_rm_general_preference.py ...            one node
    python scripts/launch_node.py --nproc 8 --nnodes 2 --node_rank 0 --master_addr 10.0.0.1 --master_port 29500 \\
        scripts/train_rm_general_preference.py ...                                                one of two nodes

Why not theirs: DeepSpeed's and torchrun's launchers do not hand a signal to all processes at once, kill what has not
ended 30 seconds later, and put an exit code of their own in place of the processes'. A run that saves a checkpoint when
it is told to stop needs all processes to hear of it together, and as long as the saving takes.

SIGTERM, SIGINT and SIGHUP go to every process, as often as they come; then there is no limit. A process that fails by
itself leaves the others 5 seconds to notice, then SIGTERM, and SIGKILL 20 seconds later. Processes die with the
launcher, however it dies. CUDA_VISIBLE_DEVICES stays as it is: LOCAL_RANK counts within it.

Exit codes: that of the first process that did not end with 0, 128 + its number for a signal; 2 for unusable arguments.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time

TIME_TO_NOTICE, TIME_TO_END, LOOK_EVERY = 5.0, 20.0, 0.05  # seconds
PR_SET_PDEATHSIG = 1


class Node:
    """The processes of this node, in the order of their local ranks."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []
        self.arrived: list[int] = []  # signals not handed on yet
        self.handed_on: set[int] = set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, lambda number, _: self.arrived.append(number))

    def start(self, command: list[str], options: argparse.Namespace) -> None:
        """Start `command` once per device; a signal that comes meanwhile leaves the rest unstarted."""
        common = {
            "WORLD_SIZE": str(options.nnodes * options.nproc),
            "LOCAL_WORLD_SIZE": str(options.nproc),
            "MASTER_ADDR": options.master_addr,
            "MASTER_PORT": str(options.master_port),
        }
        before_start = die_with_this_process()
        for local_rank in range(options.nproc):
            if self.arrived:
                break
            rank = options.node_rank * options.nproc + local_rank
            # A session of its own: what a terminal sends its processes arrives once, through `hand_on`.
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)},
                    start_new_session=True,
                    preexec_fn=before_start,
                )
            )

    def hand_on(self) -> None:
        """Send the signals that arrived to all processes."""
        while self.arrived:
            number = self.arrived.pop(0)
            self.handed_on.add(128 + number)
            for process in self.processes:
                process.send_signal(number)

    def wait(self, first_rank: int) -> int:
        """Wait until all processes have ended; the exit code of the first that failed, or else was interrupted."""
        interrupted, failed, deadlines = 0, 0, []
        running = list(range(len(self.processes)))
        while running:
            self.hand_on()
            ended = [rank for rank in running if self.processes[rank].poll() is not None]
            running = [rank for rank in running if rank not in ended]
            # Of processes that end between two looks, the one killed by a signal caused the others' errors: first.
            for code, rank in sorted((self.processes[rank].returncode, rank) for rank in ended):
                code = 128 - code if code < 0 else code
                if code in self.handed_on:
                    interrupted = interrupted or code
                elif code and not failed:
                    failed = code
                    deadlines = [time.monotonic() + TIME_TO_NOTICE, time.monotonic() + TIME_TO_NOTICE + TIME_TO_END]
                    if code != 2:  # the code of an input that every process refuses, with one line that says why
                        say(f"process {first_rank + rank} ended with exit code {code}")
            if deadlines and time.monotonic() > deadlines[0]:
                self.end(running, first_rank, signal.SIGTERM if len(deadlines) == 2 else signal.SIGKILL)
                deadlines.pop(0)
            time.sleep(LOOK_EVERY)
        return failed or interrupted

    def end(self, ranks: list[int], first_rank: int, number: signal.Signals) -> None:
        """Send a signal to the processes of these local ranks, left behind by a failure; SIGKILL with their workers."""
        names = ", ".join(str(first_rank + rank) for rank in ranks)
        say(f"ending process {names} after another one's failure ({number.name})")
        for rank in ranks:
            if number == signal.SIGKILL:
                os.killpg(self.processes[rank].pid, number)
            else:
                self.processes[rank].send_signal(number)


def say(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"launch_node.py: {text}\n")
    sys.stderr.flush()


def die_with_this_process():
    """What each process calls between fork and exec, so that a killed launcher leaves none behind; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, launcher = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def before_start() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(1)

    return before_start


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked, and the command that follows them. Exits with code 2 where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, required=True, help="processes on this node")
    parser.add_argument("--nnodes", type=int, default=1, help="nodes in all, each with as many processes")
    parser.add_argument("--node_rank", type=int, default=0, help="which of the nodes this is, from 0")
    parser.add_argument("--master_addr", help="host name or address of node 0; needed for several nodes")
    parser.add_argument("--master_port", type=int, help="a free port there; needed for several nodes")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="script.py ...", help="what to run")
    options = parser.parse_args(argv)
    if not options.command:
        parser.error("name a script to run")
    if min(options.nproc, options.nnodes) < 1 or not 0 <= options.node_rank < options.nnodes:
        parser.error("--nproc and --nnodes must be at least 1, --node_rank from 0 to --nnodes - 1")
    if options.nnodes > 1 and not (options.master_addr and options.master_port):
        parser.error("several nodes need --master_addr and --master_port, the same on each")
    options.master_addr = options.master_addr or "127.0.0.1"
    options.master_port = options.master_port or free_port()
    return options


def main(argv: list[str] | None = None) -> int:
    """Start, wait, and pass the exit code on."""
    options = parse(argv)
    node = Node()
    node.start(options.command, options)
    return node.wait(options.node_rank * options.nproc)


if __name__ == "__main__":
    sys.exit(main())
