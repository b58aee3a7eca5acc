"""The one exception that means "what you gave cannot be used", as opposed to a fault in this package.

Its message is one line that says what was found, where, and what to do. The training script prints it and exits with
code 2; in a notebook it is an ordinary ValueError.
"""


class InputError(ValueError):
    """A path, record, flag or checkpoint that cannot be used as given."""
