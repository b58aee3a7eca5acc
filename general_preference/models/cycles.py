"""Cycles among preferences: A over B, B over C, C over A. No reward model with one number can satisfy one."""

from collections.abc import Iterator


def simple_cycles(edges: list[tuple[int, int]], longest: int | None = None) -> Iterator[list[int]]:
    """All simple cycles of a small directed graph, each once.

    Args:
        edges: (winner, loser) pairs over response indices. longest: members of the longest cycle looked for; without a
            bound the search is exponential in the number of responses, with one of m members it takes K ** m steps.

    Yields:
        response indices, each preferred to the next and the last to the first, starting at the smallest index.
    """
    beats: dict[int, list[int]] = {}
    for winner, loser in edges:
        beats.setdefault(winner, []).append(loser)

    def walk(path: list[int]) -> Iterator[list[int]]:
        for following in beats.get(path[-1], ()):
            if following == path[0] and len(path) > 1:
                yield path
            elif following > path[0] and following not in path and (longest is None or len(path) < longest):
                yield from walk([*path, following])

    for start in beats:
        yield from walk([start])


def find_cycle(edges: list[tuple[int, int]]) -> list[int] | None:
    """The longest simple cycle of a small directed graph (see `simple_cycles`), the first of several; None if none."""
    return max(simple_cycles(edges), key=len, default=None)
