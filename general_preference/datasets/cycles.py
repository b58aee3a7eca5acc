"""Cyclic comparisons from rated responses: each link of a cycle is decided by another criterion.

    A > B by the first criterion, B > C by the second, C > A by the third       (arXiv 2410.02197, section 6.2 and E)

Called by scripts/make_cyclic_comparisons.py; records are groups as docs/data.md describes them.
"""

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import datasets

from general_preference.datasets.known_sets import stated_ratings
from general_preference.datasets.preparation import split_by_prompt
from general_preference.datasets.reading import described
from general_preference.errors import InputError

Ratings = list[list[float | None]]  # of K responses by n criteria; None where one was not rated
UNRATED = "N/A"
CEILING_RESPONSES = 12  # that circles join, up to which the ceiling of a scalar is computed


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
        asked, completions, texts, ratings = record["instruction"], record["completions"], [], []
        if not isinstance(asked, str) or not isinstance(completions, list):
            found_here = f"found {described(asked)} and {described(completions)}"
            raise InputError(f"{place}: expected instruction, a text, and completions, a list, {found_here}")
        for number, one in enumerate(completions):
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
        try:
            "".join([asked, *texts]).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: not valid Unicode (half of a surrogate pair)") from error
        prompts.append(RatedPrompt(str(record.get("id") or place), asked, texts, ratings))
    if missing := [name for name in criteria if name not in found]:
        raise InputError(f"no response is rated by {missing[0]!r}, found {', '.join(sorted(found)) or 'no ratings'}")
    return prompts, unrated


def find_cycles(prompt: RatedPrompt) -> list[Cycle]:
    """All cycles whose k-th link is decided by the k-th criterion, the widest first; equal texts are one response.

    A cycle that several assignments of the criteria give counts once, with the widest margins. "Wide" is the smallest
    margin of a cycle, then their sum.
    """
    ratings, found = prompt.ratings, {}
    same = list(map(prompt.responses.index, prompt.responses))
    links = len(ratings[0]) if ratings else 1
    for members in itertools.permutations(range(len(ratings)), links):
        sides = zip(members, members[1:] + members[:1], range(links), strict=True)
        pairs = [(ratings[winner][by], ratings[loser][by]) for winner, loser, by in sides]
        if any(None in pair or pair[0] <= pair[1] for pair in pairs):
            continue
        members = tuple(same[member] for member in members)
        if len(set(members)) < links:
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
    pair_share: share of their comparisons that are held out, at most one of a prompt, from all records of it.

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
    held: dict[str, set[str]] = {}  # the two responses, by prompt
    for record in (records[index] for index in train if index in giving):
        if record["prompt"] not in held:
            pair = draw.choice(record["preferences"])
            held[record["prompt"]] = _texts(record, pair)
            splits["pairs"].append(record | {"preferences": [pair]})
    for record in map(records.__getitem__, train):
        texts = held.get(record["prompt"])
        kept = [pair for pair in record["preferences"] if _texts(record, pair) != texts]
        splits["train"].append(record | {"preferences": kept})
    return splits


def _texts(record: dict, pair: list[int]) -> set[str]:
    return {record["responses"][side] for side in pair}


def scalar_ceiling(comparisons: Iterable[tuple[Hashable, Hashable, Hashable]]) -> float | None:
    """The largest accuracy on (prompt, winner, loser) that one number for each response of a prompt can have: exact.

    A response beside itself is a tie, which counts half. None if circles join more than `CEILING_RESPONSES` responses.

    Only links inside a strongly connected part can contradict each other. Of such a part, over its sets of responses,
    which of them is placed last: 2^K steps.
    """
    import networkx  # only here: the import is slow

    prompts: dict[Hashable, Counter] = {}
    for prompt, *pair in comparisons:
        prompts.setdefault(prompt, Counter())[tuple(pair)] += 1
    right = total = 0
    for counts in prompts.values():
        total += counts.total()
        right += sum(count / 2 if winner == loser else count for (winner, loser), count in counts.items())
        for part in networkx.strongly_connected_components(networkx.DiGraph(list(counts))):
            if len(part) > CEILING_RESPONSES:
                return None
            right -= _fewest_wrong(list(part), counts)
    return right / total


def _fewest_wrong(members: list, counts: Counter) -> int:
    """How many of the comparisons between these responses even their best order gets wrong."""
    beats = [[(1 << k, counts[one, other]) for k, other in enumerate(members) if other != one] for one in members]
    fewest = [0]
    for chosen in range(1, 1 << len(members)):
        fewest.append(
            min(
                fewest[chosen & ~(1 << last)] + sum(count for bit, count in beats[last] if chosen & bit)
                for last in range(len(members))
                if chosen >> last & 1
            )
        )
    return fewest[-1]
