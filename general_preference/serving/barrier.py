"""Samples that come one by one become groups: each waits for its siblings, and all are answered together.

A pairwise model has no reward for a sample alone. Trainers that ask for each sample by itself (OpenRLHF, slime, NeMo
Gym) name its group, and here the group's requests wait until the last one has come. A group never gets a number unless
it is whole: if one is lost, a deadline answers the others with an error.
"""

import asyncio
import hashlib
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from general_preference.serving.refusal import Refused

REMEMBERED = 900.0  # seconds in which a finished group still answers retries
_NAMED = 8  # lost samples that an error names at most


@dataclass(frozen=True)
class Place:
    """Which sample of which group. Equal prompts are told apart by `group`, repetitions of a group by `attempt`."""

    group: str | int
    attempt: int
    size: int
    index: int

    def __str__(self) -> str:
        return f"group {self.group!r}, attempt {self.attempt}"


@dataclass
class _Group:
    size: int
    prompt: str  # digest
    answer: asyncio.Future  # of the rewards
    deadline: asyncio.TimerHandle
    samples: dict[int, str] = field(default_factory=dict)  # index -> digest
    responses: dict[int, object] = field(default_factory=dict)  # until they are scored
    done: float = 0.0  # when it was scored


class GroupBarrier:
    """Collects groups and has each scored once, by `score(prompt, responses)` with the responses by their index."""

    def __init__(self, score: Callable[[object, list], Awaitable[list[float]]], timeout: float, most: int):
        """timeout: seconds after a group's first sample. most: groups that wait, and that are remembered when done."""
        self.score, self.timeout, self.most = score, timeout, most
        self._waiting: dict[tuple, _Group] = {}
        self._done: OrderedDict[tuple, _Group] = OrderedDict()
        self._tasks: set[asyncio.Task] = set()
        self._closed = False

    def __len__(self) -> int:
        """Groups that are not scored yet."""
        return len(self._waiting)

    async def reward(self, place: Place, prompt: object, response: object) -> float:
        """The reward of one sample, when its group is whole. Asked again, it waits for, or gets, the same answer.

        The sample stays in its group even if whoever asked goes away.

        Raises:
            Refused: 409 another prompt or response came for this place, 422 no such place, 429 too many groups wait,
                503 the server stops, 504 siblings did not come in time. Whatever scoring raises.
        """
        if not 0 <= place.index < place.size or place.size < 2:
            found = f"index {place.index} of {place.size}"
            raise Refused(422, f"{place}: {found}, expected an index from 0 to size - 1 and a size of at least 2")
        key, digest, asked = (place.group, place.attempt, place.size), _digest(response), _digest(prompt)
        while self._done and next(iter(self._done.values())).done < time.monotonic() - REMEMBERED:
            self._done.popitem(last=False)
        group = self._done.get(key) or self._waiting.get(key) or self._begin(key, place, asked)
        if group.prompt != asked:
            raise Refused(409, f"{place}: its siblings have another prompt, give this group an id of its own")
        if place.index not in group.samples:
            group.samples[place.index], group.responses[place.index] = digest, response
            if len(group.samples) == group.size:
                group.deadline.cancel()
                self._tasks.add(task := asyncio.create_task(self._finish(key, group, prompt)))
                task.add_done_callback(self._tasks.discard)
        elif group.samples[place.index] != digest:
            cure = "raise attempt to replace the group"
            raise Refused(409, f"{place}: another response came before as index {place.index}, {cure}")
        return (await asyncio.shield(group.answer))[place.index]

    def close(self) -> None:
        """Refuse the groups that are not whole, and new ones: the server stops, and no siblings will be let in."""
        self._closed = True
        for key, group in list(self._waiting.items()):
            if len(group.samples) < group.size:
                self._fail(key, group, _stopping())

    def _begin(self, key: tuple, place: Place, prompt: str) -> _Group:
        if self._closed:
            raise _stopping()
        if len(self._waiting) >= self.most:
            raise Refused(429, f"{self.most} groups wait for samples already: ask again", retry_after=5)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.timeout, self._expire, key, place)
        group = self._waiting[key] = _Group(place.size, prompt, loop.create_future(), timer)
        return group

    def _expire(self, key: tuple, place: Place) -> None:
        group = self._waiting[key]
        missing = (index for index in range(group.size) if index not in group.samples)
        lost = ", ".join(map(str, itertools.islice(missing, _NAMED)))
        lost += ", ..." * (group.size - len(group.samples) > _NAMED)
        found = f"{len(group.samples)} of {group.size} samples came within {self.timeout:g} seconds"
        self._fail(key, group, Refused(504, f"{place}: {found}, index {lost} did not"))

    def _fail(self, key: tuple, group: _Group, error: Exception) -> None:
        """Answer with an error, and forget the group, so that it can be sent again."""
        group.deadline.cancel()
        del self._waiting[key]
        group.answer.set_exception(error)
        group.answer.exception()  # whoever asked may be gone, which is no fault to log

    async def _finish(self, key: tuple, group: _Group, prompt: object) -> None:
        try:
            rewards = await self.score(prompt, [group.responses[index] for index in range(group.size)])
        except Exception as error:
            return self._fail(key, group, error)
        group.responses.clear()
        group.answer.set_result(rewards)
        group.done = time.monotonic()
        self._done[key] = self._waiting.pop(key)
        if len(self._done) > self.most:
            self._done.popitem(last=False)


def _stopping() -> Refused:
    return Refused(503, "the server stops before this group is whole: send it again")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
