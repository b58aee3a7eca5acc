"""Where the samples of a group meet: each brings what it has and waits, and the last to come has all of them scored.

For frameworks that ask for the reward of one sample at a time, in one event loop. A group ends in one of two ways: all
get their rewards, or all get an error that says who failed or how many did not come.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from general_preference.errors import RunError


@dataclass
class _Group:
    size: int
    outcome: asyncio.Future  # the task that scores, or what went wrong
    members: list = field(default_factory=list)
    seen: int = 0  # members that came or failed


class Rendezvous:
    """Groups by key. Nothing of a group is kept once all its members have come or failed.

    A member that comes after its group has failed is told so at once; a member that never comes leaves a few bytes.
    """

    def __init__(self, score: Callable[[list], Awaitable[list[float]]], deadline: float):
        """score: members of a whole group -> their rewards. deadline: seconds from a group's first member to its last.

        The deadline does not count scoring, whose first call loads a model.
        """
        self.score, self.deadline = score, deadline
        self._groups: dict[str, _Group] = {}

    async def meet(self, key: str, size: int, member: object) -> float:
        """The reward of `member`, one of `size` in the group `key`.

        Raises:
            RunError: another member failed, or did not come in time. What `score` raised is raised in every member.
        """
        group = self._enter(key, size)
        place = len(group.members)
        group.members.append(member)
        if len(group.members) == group.size:  # scored in a task of its own, which outlives a member that is canceled
            group.outcome.set_result(asyncio.ensure_future(self.score(group.members)))
        await asyncio.wait([group.outcome])
        outcome = group.outcome.result()
        if isinstance(outcome, str):
            raise RunError(outcome)
        await asyncio.wait([outcome])
        return outcome.result()[place]

    def fail(self, key: str, size: int, fault: str) -> None:
        """Say that a member will not come; the others raise a RunError with `fault`."""
        self._break(self._enter(key, size), f"no sample of group {key} gets a reward: {fault}")

    def _enter(self, key: str, size: int) -> _Group:
        group = self._groups.get(key)
        if group is None:
            loop = asyncio.get_running_loop()
            group = self._groups[key] = _Group(size, loop.create_future())
            timer = loop.call_later(self.deadline, self._expire, key, group)
            group.outcome.add_done_callback(lambda _: timer.cancel())
        group.seen += 1
        if group.seen == group.size:
            del self._groups[key]
        return group

    def _expire(self, key: str, group: _Group) -> None:
        came = f"{len(group.members)} of {group.size} samples came within {self.deadline:g} seconds"
        self._break(
            group, f"no sample of group {key} gets a reward: {came}; see why the others did not, or wait longer"
        )

    @staticmethod
    def _break(group: _Group, fault: str) -> None:
        if not group.outcome.done():  # else it is whole, and is being scored
            group.outcome.set_result(fault)
            group.members.clear()
