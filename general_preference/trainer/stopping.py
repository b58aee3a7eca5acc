"""When a run should save and when it should end: signals and the clock, agreed by all processes after a step."""

import os
import signal
import threading
import time

import torch

from general_preference.distributed import DistributedContext

CAUGHT = (signal.SIGTERM, signal.SIGINT)
TOGETHER = 1.0  # seconds within which signals count as one: a scheduler may tell the launcher and its processes


class StopRequests:
    """Catches SIGTERM and SIGINT while in use: the first is remembered, one that comes later ends the process at once.

    Schedulers send SIGTERM before they kill; Ctrl-C is SIGINT. `minutes`: also ask for a checkpoint that often.
    """

    def __init__(self, context: DistributedContext, minutes: float | None):
        self.context, self.seconds = context, None if minutes is None else 60 * minutes
        self.received, self.received_at = 0, 0.0
        self.saved_at = time.monotonic()
        self._before: dict = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in CAUGHT}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self.received:
            if time.monotonic() - self.received_at > TOGETHER:
                os._exit(128 + number)
            return
        self.received, self.received_at = number, time.monotonic()
        if self.context.is_main:  # not logged: a handler may interrupt the logging of the same line
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing the step, then saving; a second signal exits at once\n".encode())

    def agree(self) -> tuple[int, bool]:
        """What all processes act on alike: (signal that any of them received, or 0; whether a checkpoint is due by the
        clock). Collective; on the hosts, so that no accelerator is waited for.
        """
        due = self.context.is_main and self.seconds is not None and time.monotonic() - self.saved_at >= self.seconds
        number, due = self.context.all_reduce_max(torch.tensor([self.received, int(due)])).tolist()
        return number, bool(due)

    def saved(self) -> None:
        """A checkpoint was written now."""
        self.saved_at = time.monotonic()


def ignore_signals_in_worker(parent: int, _worker: int = 0) -> None:
    """For the processes that a DataLoader starts: end when their parent ends them, not by signals meant for the run.

    Ctrl-C, Slurm's and torchrun's signals reach every process of a group; a worker that ended by them would fail the
    step that is still to be finished.

    Args:
        parent: process id of the trainer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
