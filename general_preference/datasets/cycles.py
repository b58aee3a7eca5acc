"""Cyclic comparisons from rated responses: each link of a cycle is decided by another criterion.

    A > B by the first criterion, B > C by the second, C > A by the third       (arXiv 2410.02197, section 6.2 and E)

Called by scripts/make_cyclic_comparisons.py; records are groups as docs/data.md describes them.
"""

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

import datasets

from general_preference.datasets.known_sets import stated_ratings
from general_preference.datasets.preparation import split_by_prompt
from general_preference.datasets.reading import described
from general_preference.errors import InputError

Ratings = list[list[float | None]]  # of K responses by n criteria; None where one was not rated
UNRATED = "N/A"


@dataclass(frozen=True)
class Cycle:
    """Responses of which each is preferred to the next and the last to the first, from the smallest index on.

    margins: by how much each link's winner is rated above its loser, in units of the ratings.
    """

    members: tuple[int, ...]
    margins: tuple[float, ...]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(winner, loser) of each link."""
        return list(zip(self.members, self.members[1:] + self.members[:1], strict=True))


@dataclass(frozen=True)
class RatedPrompt:
    """A prompt with K responses and their ratings (K, n). id: for people."""

    id: str
    prompt: str
    responses: list[str]
    ratings: Ratings


def check_criteria(criteria: list[str]) -> None:
    """InputError unless cycles can run through these criteria: three links or more, and more than one criterion."""
    if len(criteria) < 3:
        raise InputError(f"criteria {','.join(criteria)}: a cycle needs at least three, one for each link")
    if len(set(criteria)) == 1:
        raise InputError(f"criteria {','.join(criteria)}: one criterion ranks responses and has no cycles, name others")


def read_rated(records: Iterable[tuple[str, object]], criteria: list[str]) -> tuple[list[RatedPrompt], int]:
    """(prompts, ratings that were not given ("N/A")) of (place, record) in UltraFeedback's layout.

    Raises:
        InputError: another layout, a rating that is no number, or a criterion by which nothing is rated.
    """
    prompts, unrated, found = [], 0, set()
    for place, record in records:
        if isinstance(record, InputError):
            raise record
        if not isinstance(record, dict) or not {"instruction", "completions"} <= record.keys():
            keys = sorted(record) if isinstance(record, dict) else described(record)
            raise InputError(f"{place}: found {keys}, expected instruction and completions (UltraFeedback's layout)")
        texts, ratings = [], []
        for number, one in enumerate(record["completions"]):
            if not isinstance(one, dict) or not isinstance(one.get("response"), str):
                raise InputError(f"{place}: completion {number} has no text 'response', found {described(one)}")
            try:
                stated = stated_ratings(one, f"completion {number}")
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
            found |= stated.keys()
            values = [stated.get(name, UNRATED) for name in criteria]
            for name, value in zip(criteria, values, strict=True):
                if not isinstance(value, float) and value not in (UNRATED, "None"):
                    raise InputError(f"{place}: completion {number} is rated {value!r} by {name}, expected a number")
            unrated += sum(not isinstance(value, float) for value in values)
            texts.append(one["response"])
            ratings.append([value if isinstance(value, float) else None for value in values])
        prompts.append(RatedPrompt(str(record.get("id") or place), record["instruction"], texts, ratings))
    if missing := [name for name in criteria if name not in found]:
        raise InputError(f"no response is rated by {missing[0]!r}, found {', '.join(sorted(found)) or 'no ratings'}")
    return prompts, unrated


def find_cycles(prompt: RatedPrompt) -> list[Cycle]:
    """All cycles whose k-th link is decided by the k-th criterion, the widest first; none through equal texts.

    A cycle that several assignments of the criteria give counts once, with the widest margins. "Wide" is the smallest
    margin of a cycle, then their sum.
    """
    ratings, found = prompt.ratings, {}
    links = len(ratings[0]) if ratings else 0
    for members in itertools.permutations(range(len(ratings)), links):
        sides = zip(members, members[1:] + members[:1], range(links), strict=True)
        pairs = [(ratings[winner][by], ratings[loser][by]) for winner, loser, by in sides]
        if any(None in pair or pair[0] <= pair[1] for pair in pairs):
            continue
        if len({prompt.responses[member] for member in members}) < links:
            continue
        start = members.index(min(members))
        margins = tuple(high - low for high, low in pairs)
        cycle = Cycle(*(some[start:] + some[:start] for some in (members, margins)))
        found[cycle.members] = max(cycle, found.get(cycle.members, cycle), key=_width)
    return sorted(found.values(), key=lambda cycle: (*(-value for value in _width(cycle)), cycle.members))


def _width(cycle: Cycle) -> tuple[float, float]:
    return min(cycle.margins), sum(cycle.margins)


def without_conflicts(cycles: list[Cycle]) -> list[Cycle]:
    """The cycles, in their order, without those that turn a comparison of an earlier one around."""
    kept, edges = [], set()
    for cycle in cycles:
        if not any((loser, winner) in edges for winner, loser in cycle.edges):
            kept.append(cycle)
            edges |= set(cycle.edges)
    return kept


def make_record(prompt: RatedPrompt, cycles: list[Cycle]) -> dict:
    """A group of the responses that are on a cycle, with every comparison of the cycles once."""
    members = sorted({member for cycle in cycles for member in cycle.members})
    edges = sorted({(members.index(a), members.index(b)) for cycle in cycles for a, b in cycle.edges})
    responses = [prompt.responses[member] for member in members]
    return {"id": prompt.id, "prompt": prompt.prompt, "responses": responses, "preferences": list(map(list, edges))}


def split_records(records: list[dict], train_ratio: float, pair_share: float, seed: int) -> dict[str, list[dict]]:
    """{"train", "pairs", "prompts"}: what is trained on, other comparisons of those prompts, and other prompts.

    train_ratio: share of the records to train on, by whole prompts; below 1.
    pair_share: share of their comparisons that are held out, at most one of a record.

    Source: arXiv 2410.02197 tests on training prompts "with different comparison pairs" (section 6.2): on `pairs`.
    """
    keys = datasets.Dataset.from_dict({"prompt_key": [record["prompt"] for record in records]})
    train, held_out = split_by_prompt(keys, train_ratio, seed=seed)
    if not held_out:
        raise InputError(f"train_split_ratio {train_ratio} of {len(records)} prompts holds none out: lower it")
    draw = random.Random(seed)
    total = sum(len(records[index]["preferences"]) for index in train)
    giving = set(draw.sample(train, min(round(pair_share * total), len(train))))
    splits = {"train": [], "pairs": [], "prompts": [records[index] for index in held_out]}
    for index in train:
        stated = records[index]["preferences"]
        held = [draw.choice(stated)] if index in giving else []
        splits["train"].append(records[index] | {"preferences": [pair for pair in stated if pair not in held]})
        splits["pairs"] += [records[index] | {"preferences": held}] if held else []
    return splits


def scalar_ceiling(groups: Iterable[tuple[int, list]]) -> float:
    """The largest share of the comparisons that one number for each response can get right: exact.

    groups: (K, [(winner, loser), ...]) of each prompt. Over sets of responses, which of them is placed last: 2^K steps.
    """
    right = total = 0
    for count, edges in groups:
        best = {0: 0}
        for chosen in range(1, 1 << count):
            best[chosen] = max(
                best[chosen & ~(1 << last)] + sum(loser == last and chosen >> winner & 1 for winner, loser in edges)
                for last in range(count)
                if chosen >> last & 1
            )
        right, total = right + best[(1 << count) - 1], total + len(edges)
    return right / total
