"""Exceptions that are messages to people, as opposed to a fault in this package.

Each message is one line that says what was found, where, and what to do; the scripts print it and exit. `everywhere`
says that all processes of the run raise the same, so that one of them prints it.
"""


class InputError(ValueError):
    """A path, record, flag or checkpoint that cannot be used as given. Exit code 2; in a notebook a ValueError."""

    everywhere = True  # every process is given the same, see `main_process_first`


class RunError(RuntimeError):
    """A run cannot go on for a reason outside this package: a full disk, a lost process. Exit code 1."""

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class NonFiniteError(RunError):
    """A loss or score became NaN or infinite; the message names the comparisons. Exit code 1."""


class Stopped(BaseException):
    """SIGTERM or SIGINT asked the run to end; no Exception, so that nothing on the way takes it for a fault.

    signal_number: exit code - 128. said: what was saved, if anything was.
    """

    everywhere = True

    def __init__(self, signal_number: int, said: str = ""):
        super().__init__(signal_number)
        self.signal_number, self.said = signal_number, said
