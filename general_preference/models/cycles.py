"""Cycles among stated preferences: A over B, B over C, C over A. No reward model with one number can satisfy one."""


def find_cycle(edges: list[tuple[int, int]]) -> list[int] | None:
    """The longest simple cycle of a small directed graph, None if it has none.

    Args:
        edges: (winner, loser) pairs over response indices. Meant for groups of a few responses: the search is
            exhaustive, exponential in the number of responses.

    Returns:
        response indices, each preferred to the next and the last to the first, starting at the smallest index.
    """
    beats: dict[int, list[int]] = {}
    for winner, loser in edges:
        beats.setdefault(winner, []).append(loser)
    best: list[int] = []

    def walk(path: list[int]) -> None:
        nonlocal best
        for following in beats.get(path[-1], ()):
            if following == path[0] and len(path) > len(best) and len(path) > 1:
                best = list(path)
            elif following > path[0] and following not in path:
                walk([*path, following])

    for start in beats:
        walk([start])
    return best or None
