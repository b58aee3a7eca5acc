"""What a user says about the columns of a data set, and what all readers of records share."""

from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from itertools import combinations

_PLAIN = int | float | bool | date | timedelta | Decimal | None


@dataclass(frozen=True)
class Reading:
    """How the columns of records are read.

    custom:         require the custom format (`is_custom_dataset`).
    prompt_key, chosen_key, rejected_key, system_key: names of the columns that hold these; None: known names.
    ignore_columns: columns with text, and fields of messages, that may be left out.
    criterion:      which rating decides where a set has several; None: their mean.
    strength:       what a stated strength of preference becomes: "margin", or "label" (a soft label).
    """

    custom: bool = False
    prompt_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None
    system_key: str | None = None
    ignore_columns: tuple[str, ...] = ()
    criterion: str | None = None
    strength: str = "margin"

    @property
    def keys(self) -> dict[str, str]:
        """{canonical name: column} of the columns that were named."""
        named = {name: getattr(self, f"{name}_key") for name in ("prompt", "chosen", "rejected", "system")}
        return {name: column for name, column in named.items() if column}


def by_merit(values: list[float]) -> list[tuple[int, int, float]]:
    """All pairs (i, j, probability that i is preferred) of responses by a number, the higher the better; equal: 0.5."""
    pairs = []
    for i, j in combinations(range(len(values)), 2):
        better, worse = (i, j) if values[i] >= values[j] else (j, i)
        pairs.append((better, worse, 0.5 if values[i] == values[j] else 1.0))
    return pairs


def described(value: object) -> str:
    """A short name for any value in an error message."""
    text = repr(value)
    kinds = {list: "a list", dict: "an object", str: "text", type(None): "nothing"}
    return f"{kinds.get(type(value), type(value).__name__)} {text if len(text) <= 60 else text[:57] + '...'}"


def holds_text(value: object) -> bool:
    """Whether a value says something: text that is not blank, or anything that is no number, date or list of such."""
    if isinstance(value, str):
        return not value.isspace() and value != ""
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_text, value))
    return not isinstance(value, _PLAIN)
