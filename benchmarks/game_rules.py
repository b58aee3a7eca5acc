"""Who wins the bundled games: the truth behind data/, which no model sees."""

import re

from data.make_data import GAMES, Game


def game_of(prompt: str) -> tuple[str, Game]:
    """The set and the game that a bundled prompt is about."""
    return next((kind, game) for kind, games in GAMES.items() for game in games if game.name in prompt)


def rank(prompt: str, reply: str) -> int | None:
    """Position in `Game.members` of the member that a reply names; None where it does not name exactly one."""
    members = game_of(prompt)[1].members
    named = [index for index, member in enumerate(members) if re.search(rf"\b{member}\b", reply)]
    return named[0] if len(named) == 1 else None


def beats(kind: str, size: int, first: int | None, second: int | None) -> float:
    """1 if the first member wins, 0 if it loses, else one half; valid replies beat invalid ones (None).

    In "mixed", 0 beats the others; in circles each member beats the next (docstring of data/make_data.py).
    """
    if first == second:
        return 0.5
    if first is None or second is None:
        return float(second is None)
    if kind == "transitive":
        return float(first < second)
    if kind == "mixed":
        if 0 in (first, second):
            return float(first == 0)
        first, second, size = first - 1, second - 1, size - 1
    return {1: 1.0, size - 1: 0.0}.get((second - first) % size, 0.5)


def exploitability(kind: str, size: int, shares: dict[int | None, float]) -> float:
    """Wins less losses of the best member against a policy that plays these shares; 0 where nothing beats it."""
    return max(
        sum(share * (2 * beats(kind, size, one, other) - 1) for other, share in shares.items()) for one in range(size)
    )
