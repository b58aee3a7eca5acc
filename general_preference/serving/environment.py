"""Settings of the adapters, which a framework starts without arguments: they are environment variables.

    GPM_MODEL     folder or hub name of the preference model, or GPM_URL: address of a preference server
    GPM_MODE      of `group_reward.MODES`; default win_rate
    GPM_DEADLINE  seconds that the samples of a group wait for the last of them; default 1800
    GPM_OPTIONS   JSON object with further arguments of `GroupReward`, such as {"device": "cpu", "dtype": "bfloat16"}

GPM_API_KEY is read by whatever asks a server.
"""

import json
import math
import os
from collections.abc import Awaitable, Callable

from general_preference.errors import InputError
from general_preference.serving.group_reward import AsyncGroupReward

DEADLINE = 1800.0  # seconds: the longest sample of a group may be generated long after the shortest


def reward_from_environment() -> AsyncGroupReward:
    """The group reward that GPM_MODEL or GPM_URL, GPM_MODE and GPM_OPTIONS name; the model is loaded when first used.

    Raises:
        InputError: settings that are missing, contradict each other or cannot be used.
    """
    model, url = (os.environ.get(name) or None for name in ("GPM_MODEL", "GPM_URL"))
    if (model is None) == (url is None):
        raise InputError("set one of GPM_MODEL and GPM_URL, and not both, for the processes that compute rewards")
    try:
        options = json.loads(os.environ.get("GPM_OPTIONS") or "{}")
        return AsyncGroupReward(model, os.environ.get("GPM_MODE") or "win_rate", url=url, **options)
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"GPM_OPTIONS are no JSON object with arguments of GroupReward: {error}") from error


def deadline_from_environment() -> float:
    """Seconds of GPM_DEADLINE.

    Raises:
        InputError: not a number above 0.
    """
    text = os.environ.get("GPM_DEADLINE") or str(DEADLINE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"GPM_DEADLINE is {text!r}, expected a number of seconds above 0")
    return seconds


def group_scorer(reward: AsyncGroupReward) -> Callable[[list[tuple]], Awaitable[list[float]]]:
    """A function: members of a group, each (prompt, completion, reference or None), of one prompt -> rewards."""

    async def score(members: list[tuple]) -> list[float]:
        prompts, completions, references = map(list, zip(*members, strict=True))
        columns = {reward.reference: references} if reward.mode == "reference" else {}
        return await reward(prompts, completions, **columns)

    return score
