"""Exceptions that are messages to people: one line that says what was found, where, and what to do.

The scripts print them and exit; any other exception is a fault and keeps its traceback. `everywhere` says that all
processes of the run raise the same, so that the main process alone prints it.
"""


class InputError(ValueError):
    """A path, record, flag or checkpoint that cannot be used as given. Exit code 2; in a notebook a ValueError."""

    everywhere = True


class RunError(RuntimeError):
    """A run cannot go on for a reason outside this package, such as a full disk. Exit code 1."""

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class NonFiniteError(RunError):
    """A loss or score became NaN or infinite; the message names the comparisons. Exit code 1."""


class Stopped(BaseException):
    """SIGTERM or SIGINT (`signal_number`) ended the run; `said` is what was saved. No Exception: it is no fault."""

    everywhere = True

    def __init__(self, signal_number: int, said: str = ""):
        super().__init__(signal_number)
        self.signal_number, self.said = signal_number, said
