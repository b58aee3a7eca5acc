"""The one record that every evaluation set is read into: a prompt, K responses, who is better, and the rule.

`record_table` makes of records the table that batch inference, RewardBench and the pipeline tokenize and score: K
responses behind one copy of their prompt.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import datasets

from general_preference.datasets.messages import Message
from general_preference.datasets.sources import ROW

UNREAD = ("reader", "problem")  # columns of `sources.ROW` that only reading files fills


@dataclass(frozen=True)
class Record:
    """A prompt with K responses.

    id:         unique in its set
    set:        name of the set, a key of `sets.SETS`. subset: what its aggregate takes a mean over. language: or ""
    prompt:     messages. responses: K lists of messages, almost always one of the assistant
    pairs:      (winner, loser) indices into `responses`
    rule:       what the scores of the record are judged by, of `rules.RULES`
    """

    id: str
    set: str
    subset: str
    language: str
    prompt: list[Message]
    responses: list[list[Message]]
    pairs: list[tuple[int, int]]
    rule: str

    @property
    def lengths(self) -> list[int]:
        """Characters of each response."""
        return [sum(len(message["content"]) for message in response) for response in self.responses]


def with_unique_ids(records: Iterable[Record]) -> list[Record]:
    """The records; the second one of an id is called id#2, the third id#3."""
    seen: Counter[str] = Counter()
    unique = []
    for record in records:
        seen[record.id] += 1
        unique.append(record if seen[record.id] == 1 else replace(record, id=f"{record.id}#{seen[record.id]}"))
    return unique


def record_table(records: list[Record]) -> datasets.Dataset:
    """A table with the columns of `sources.ROW` that `preparation.tokenize` reads, in the records' order."""
    rows = []
    for record in records:
        winners, losers = (list(side) for side in zip(*record.pairs, strict=True))
        names = {"id": record.id, "subset": record.subset, "extras": "", "margin": 0.0}
        preferences = {"first": winners, "second": losers, "label": [1.0] * len(winners)}
        rows.append(names | preferences | {"prompt": record.prompt, "responses": record.responses})
    features = datasets.Features({name: kind for name, kind in ROW.items() if name not in UNREAD})
    return datasets.Dataset.from_list(rows, features=features)
