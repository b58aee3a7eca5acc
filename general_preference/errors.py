"""Exceptions that are messages to people, as opposed to a fault in this package.

Each message is one line that says what was found, where, and what to do; the scripts print it and exit. `everywhere`
says that all processes of the run raise the same, so that one of them prints it.
"""


class InputError(ValueError):
    """A path, record, flag or checkpoint that cannot be used as given. Exit code 2; in a notebook a ValueError."""

    everywhere = True  # every process is given the same, and `Processes.main_first` tells the others what one found


class NonFiniteError(RuntimeError):
    """A loss or score became NaN or infinite; the message names the comparisons. Exit code 1."""

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere
