"""When a run should save and when it should end: signals and the clock, agreed by all processes after a step."""

import os
import signal
import threading
import time

from general_preference.trainer.deepspeed_engine import DeepSpeedEngine

CAUGHT = (signal.SIGTERM, signal.SIGINT)
TOGETHER = 1.0  # seconds within which signals count as one: a scheduler may tell launcher and processes


class StopRequests:
    """Catches SIGTERM and SIGINT while in use: the first is remembered, one that comes later ends the process at once.

    Schedulers send SIGTERM before they kill; Ctrl-C is SIGINT. `minutes`: also ask for a checkpoint that often.
    """

    def __init__(self, strategy: DeepSpeedEngine, minutes: float | None):
        self.strategy, self.seconds = strategy, None if minutes is None else 60 * minutes
        self.received = 0
        self.saved_at = time.monotonic()
        self._before: dict = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in CAUGHT}
        return self

    def __exit__(self, *_) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        self.received = number
        for each in CAUGHT:  # by the kernel: this function runs late while a library computes or waits
            signal.signal(each, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, self._listen_again)
        signal.setitimer(signal.ITIMER_REAL, TOGETHER)
        # Not logged: a handler may interrupt the logging of the same line.
        if self.strategy.is_main:
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing the step, then saving; once more ends at once\n".encode())

    def _listen_again(self, *_) -> None:
        for each in CAUGHT:
            signal.signal(each, signal.SIG_DFL)

    def agree(self, mine: bool = False) -> tuple[int, bool, bool]:
        """What all processes act on alike: (signal that any of them received or 0, whether a checkpoint is due by the
        clock, whether `mine` is true on any). Collective, one small reduction.
        """
        due = self.strategy.is_main and self.seconds is not None and time.monotonic() - self.saved_at >= self.seconds
        number, due, theirs = self.strategy.all_reduce_max([self.received, due, mine])
        return int(number), bool(due), bool(theirs)

    def saved(self) -> None:
        """A checkpoint was written now."""
        self.saved_at = time.monotonic()


def ignore_signals_in_worker(parent: int, _worker: int = 0) -> None:
    """For the processes that a DataLoader starts: end when their parent ends them, not by signals meant for the run.

    A terminal's Ctrl-C and Slurm's signals reach every process; a worker that ended by them would fail the step that is
    still to be finished.

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
