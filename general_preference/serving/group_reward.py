"""Rewards of groups: K responses to one prompt are compared with each other, for the cost of K forward passes.

`GroupReward` is a reward function for TRL (GRPO, RLOO, OnlineDPO, AsyncGRPO) and whatever else calls a function with
lists of prompts and completions. A pairwise model has no reward for a response alone: it depends on the
group, so a group that is split over calls or processes is refused, and a fault is an error, never a reward of 0.
"""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Hashable

import torch

from general_preference.errors import InputError
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.inputs import as_list
from general_preference.inference.pipeline import GPMPipeline
from general_preference.inference.ranking import borda, nash
from general_preference.inference.scorer import PreferenceScorer
from general_preference.models.score import plane_advantages, preference_probability

MODES = ("win_rate", "nash", "score", "reference", "planes")
GROUP_COLUMNS = ("prompt_id", "uid")  # of the data set, or of the framework: equal for the completions of a group


class GroupReward:
    """A reward function over whole groups, picklable; the model is loaded with the first call.

    mode:
        win_rate:  mean probability of winning against the others of the group; the rewards of a group sum to K / 2
        nash:      weight in the mixture that nothing beats (`ranking.nash`); they sum to 1
        score:     mean score against the others, a logit; they sum to 0
        reference: probability of winning against the response in a column of the data set
        planes:    the group-relative advantage of each plane, weighed by the gate (`plane_advantages`); they sum to 0
    """

    def __init__(
        self,
        model: str | os.PathLike | PreferenceScorer | None = None,
        mode: str = "win_rate",
        *,
        url: str | None = None,
        group_size: int | None = None,
        eval_group_size: int | None = None,
        group_column: str | None = None,
        halves: bool = False,
        reference: str = "reference",
        **options,
    ):
        """Check the settings; nothing is loaded yet.

        Args:
            model: folder or hub name, or a `GPMPipeline` or `RemotePreference`. url: of a preference server instead.
            group_size: completions of a prompt in training, TRL's `num_generations`. Needed with several processes,
                where a group that is split over them cannot be seen otherwise.
            eval_group_size: in evaluation, if it is another.
            group_column: column that is equal for the completions of a group alone; default `prompt_id` or `uid` if
                there is one. Without a column, completions of equal prompts are groups of `group_size`, in their order.
            halves: the second completions of all prompts come after the first ones, as in TRL's OnlineDPO. Only needed
                to tell groups of equal prompts apart; where no other order is possible, it is seen.
            reference: column of the response that mode "reference" compares with.
            options: of `GPMPipeline`, such as device="cuda:1" or dtype="bfloat16".

        Raises:
            InputError (a ValueError): an unknown mode, or settings that contradict each other.
        """
        if mode not in MODES:
            raise InputError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
        if (model is None) == (url is None):
            raise InputError("one of model and url is needed, and not both: where is the preference model?")
        if options and not isinstance(model, str | os.PathLike):
            raise InputError(f"{', '.join(options)} would be of a model that is loaded here: drop what is not meant")
        for name, size in (("group_size", group_size), ("eval_group_size", eval_group_size)):
            if size is not None and size < 1:
                raise InputError(f"{name} is {size}, expected at least 1")
        self.model, self.mode, self.url, self.options = model, mode, url, options
        self.sizes = tuple(dict.fromkeys(size for size in (group_size, eval_group_size) if size is not None))
        self.group_column, self.halves, self.reference = group_column, halves, reference
        self.__name__ = f"preference_{mode}"  # by which trainers log it
        self._scorer = model if isinstance(model, PreferenceScorer) else None
        self._turn = threading.Lock()  # a tokenizer serves one thread at a time, and the model is loaded once

    def __getstate__(self) -> dict:
        loaded = not isinstance(self.model, PreferenceScorer)
        state = {name: value for name, value in vars(self).items() if name != "_turn"}
        return state | ({"_scorer": None} if loaded else {})  # another process loads its own

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _turn=threading.Lock())

    def __call__(self, prompts, completions, **columns) -> list[float]:
        """One reward per completion.

        Args:
            prompts, completions: N texts or lists of messages each. columns: of the data set, N values each; trainers
                add others of their own, which are not read.

        Raises:
            InputError (a ValueError): a group that is not whole, or something that cannot be scored.
        """
        prompts, completions = as_list(prompts, "prompts", "a list"), as_list(completions, "completions", "a list")
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts, but {len(completions)} completions: give one for each")
        if not prompts:
            return []
        groups = self.groups(prompts, columns)
        responses = [[completions[row] for row in rows] for rows in groups]
        if self.mode == "reference":
            for some, rows in zip(responses, groups, strict=True):
                some += [self._reference(columns, row) for row in rows]
        with self._turn if self.url is None else contextlib.nullcontext():
            embedded = self.scorer.embed([prompts[rows[0]] for rows in groups], responses)
        rewards = [0.0] * len(prompts)
        for rows, one in zip(groups, embedded, strict=True):
            for row, reward in zip(rows, group_rewards(one, len(rows), self.mode, self.scorer.tau), strict=True):
                rewards[row] = reward
        return rewards

    @property
    def scorer(self) -> PreferenceScorer:
        """What scores: loaded now, or reached by `url`."""
        if self._scorer is None and self.url is not None:
            from general_preference.serving.client import PreferenceClient

            self._scorer = PreferenceClient(self.url)
        elif self._scorer is None:
            self._scorer = GPMPipeline(self.model, **self.options)
        return self._scorer

    def groups(self, prompts: list, columns: dict) -> list[list[int]]:
        """Indices of the rows of each group, in the order of their first rows.

        Raises:
            InputError: the groups are not of the sizes that were named, or of different sizes where none was.
        """
        name = self.group_column or next((name for name in GROUP_COLUMNS if name in columns), None)
        keys = [json.dumps(prompt, sort_keys=True, default=str) for prompt in prompts]
        same: dict[Hashable, list[int]] = {}
        for row, value in enumerate(keys if name is None else self._column(columns, name, len(prompts))):
            same.setdefault(value, []).append(row)
            if keys[row] != keys[first := same[value][0]]:
                raise InputError(f"rows {first} and {row} have the same {name}, but other prompts")
        found = sorted({len(rows) for rows in same.values()})
        if self.mode == "reference":
            return list(same.values())  # nothing is compared within them
        if not self.sizes:
            self._check_unsized(found)
            return list(same.values())
        fits = [size for size in self.sizes if all(n % size == 0 for n in found)]  # a prompt may be there twice
        if not fits:
            wanted, numbers = (" or ".join(map(str, some)) for some in (self.sizes, found))
            raise InputError(
                f"a group has {wanted} completions, but this call has {numbers} with the same {name or 'prompt'} of "
                f"{len(prompts)} in all, so groups are split: in TRL, per_device_train_batch_size times "
                "steps_per_generation (default gradient_accumulation_steps) must be a multiple of num_generations"
            )
        size, half = found[0] if found[0] in fits and len(found) == 1 else fits[0], len(keys) // 2
        fits_halves = name is None and size == 2 and keys[:half] == keys[half:]
        if self.halves and not fits_halves:
            raise InputError("halves: the second half of the prompts is not the first one again, in pairs")
        if fits_halves and (self.halves or keys[::2] != keys[1::2]):
            return [[row, row + half] for row in range(half)]
        return [rows[at : at + size] for rows in same.values() for at in range(0, len(rows), size)]

    def _check_unsized(self, found: list[int]) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1:
                cause = f"with {processes} processes a group that is split over them cannot be seen"
                raise InputError(f"{cause}: set group_size to the number of completions of a prompt")
        if len(found) > 1:
            numbers = " and ".join(map(str, found))
            raise InputError(f"prompts with {numbers} completions: set group_size, or name groups by prompt_id")
        if found == [1]:
            raise InputError("each prompt has one completion and nothing to be compared with: set group_size")

    @staticmethod
    def _column(columns: dict, name: str, count: int) -> list:
        if name not in columns:
            raise InputError(f"there is no column {name!r}: the call has {', '.join(columns) or 'none'}")
        values = as_list(columns[name], name, "a list with one for each prompt")
        if len(values) != count:
            raise InputError(f"{name} has {len(values)} values, but there are {count} prompts")
        return values

    def _reference(self, columns: dict, row: int):
        values = columns.get(self.reference)
        if values is None or row >= len(values) or values[row] is None:
            raise InputError(f"row {row} has no {self.reference!r}, with which mode reference compares")
        return values[row]


class AsyncGroupReward(GroupReward):
    """`GroupReward` for frameworks that await reward functions: the event loop goes on while a thread scores."""

    async def __call__(self, prompts, completions, **columns) -> list[float]:
        """As `GroupReward`."""
        return await asyncio.to_thread(super().__call__, prompts, completions, **columns)


def group_rewards(embedded: EmbeddedPrompt, count: int, mode: str, temperature: float) -> list[float]:
    """The rewards of the first `count` responses of a group; in mode reference the others are their references."""
    scores = embedded.scores()
    if mode == "reference":
        return preference_probability(scores[:count, count:].diagonal(), temperature).tolist()
    if mode == "score":
        return (scores.sum(dim=1) / max(count - 1, 1)).tolist()
    if mode == "planes":
        return plane_advantages(embedded.embeddings, embedded.gate).tolist()
    weights = nash if mode == "nash" else borda
    return weights(preference_probability(scores, temperature)).tolist()
