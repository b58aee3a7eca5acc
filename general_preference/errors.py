"""Exceptions that are messages to people, as opposed to a fault in this package.

Each message is one line that says what was found, where, and what to do; the scripts print it and exit.
"""


class InputError(ValueError):
    """A path, record, flag or checkpoint that cannot be used as given. Exit code 2; in a notebook a ValueError."""


class NonFiniteError(RuntimeError):
    """A loss or score became NaN or infinite; the message names the comparisons. Exit code 1."""
