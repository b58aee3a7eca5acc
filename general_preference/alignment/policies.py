"""Held-out samples of several policies, and what a preference model makes of them. For scripts/compare_policies.py.

A file of samples has a line for each prompt: {"id", "prompt", "responses": [text, K], "response_ids": [[int], K],
"finished": [bool, K]}, and its settings in the summary beside it. All policies answer the same prompts.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from general_preference.alignment.report import Contest
from general_preference.datasets.messages import Message, parse_prompt
from general_preference.errors import InputError
from general_preference.files import read_object
from general_preference.inference.batch import ResultStore
from general_preference.inference.pipeline import GPMPipeline

_COLUMNS = {"responses": str, "response_ids": list, "finished": bool}


@dataclass(frozen=True)
class PolicyAnswers:
    """K >= 2 responses of one policy to one prompt. lengths: in its own tokens. finished: ended by itself."""

    prompt: list[Message]
    responses: list[str]
    lengths: list[int]
    finished: list[bool]


@dataclass(frozen=True)
class Policy:
    """A policy as its samples show it. answers: {id of the prompt: its answers}. settings: of sampling, may be {}."""

    path: str
    answers: dict[str, PolicyAnswers]
    settings: dict

    def shares(self) -> dict[str, float]:
        """Mean length in tokens, share that did not finish, share that repeats another response to the same prompt."""
        rows = self.answers.values()
        columns = {
            "length_mean": [sum(row.lengths) / len(row.lengths) for row in rows],
            "unfinished_share": [1 - sum(row.finished) / len(row.finished) for row in rows],
            "duplicate_share": [1 - len(set(row.responses)) / len(row.responses) for row in rows],
        }
        return {name: sum(values) / len(values) for name, values in columns.items()}


def read_policy(path: str) -> Policy:
    """A finished file of samples.

    Raises:
        InputError: no such file, of a run that was stopped, a line that is no sample, or a prompt with one response.
    """
    store = ResultStore(Path(os.path.expanduser(path)))
    if (store.parts / "settings.json").exists():
        raise InputError(f"{path} is of a run that was stopped or still runs: finish it with the same command")
    try:
        lines = store.output.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a file of samples") from error
    answers = {}
    for number, line in enumerate(lines, 1):
        try:
            name, row = _read_line(json.loads(line, parse_constant=_refuse))
            if name in answers:
                raise ValueError(f"its id {name!r} occurs twice")
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}, line {number} is no sample of a policy: {problem}") from error
        answers[name] = row
    if not answers:
        raise InputError(f"{path} is empty: it holds no samples")
    settings = read_object(store.summary).get("settings", {})
    return Policy(path, answers, settings)


def _refuse(constant: str):
    raise ValueError(f"it holds {constant}")


def _read_line(row: dict) -> tuple[str, PolicyAnswers]:
    count = len(row["responses"])
    for name, kind in _COLUMNS.items():
        if not isinstance(row[name], list) or not all(isinstance(one, kind) for one in row[name]):
            raise ValueError(f"its {name} are no list of {kind.__name__}")
        if len(row[name]) != count:
            raise ValueError(f"it has {count} responses, but {len(row[name])} {name}")
    if not isinstance(row["id"], str):
        raise ValueError(f"its id is {row['id']!r}, expected text")
    if count < 2:
        raise ValueError(f"it has {count} response, expected at least 2: sample more to each prompt")
    prompt = parse_prompt(row["prompt"])
    return row["id"], PolicyAnswers(prompt, row["responses"], list(map(len, row["response_ids"])), row["finished"])


def check_same_prompts(policies: dict[str, Policy]) -> None:
    """InputError unless all policies answer the prompts of the first, compared by id and text."""
    (first, start), *others = policies.items()
    for name, other in others:
        if different := sorted(start.answers.keys() ^ other.answers.keys()):
            one, lacks = different[0], name if different[0] in start.answers else first
            raise InputError(
                f"{start.path} and {other.path} are of other prompts: {lacks} has no {one!r} ({len(different)} differ)"
            )
        for key, answers in start.answers.items():
            if other.answers[key].prompt != answers.prompt:
                raise InputError(f"{start.path} and {other.path} have other prompts under the id {key!r}")


def score_policies(rm: GPMPipeline, policies: dict[str, Policy]) -> list[Contest]:
    """A `Contest` for each prompt, in the order of the first policy; all policies' responses are embedded behind it."""
    first, *_ = policies.values()
    groups = [[policy.answers[key] for policy in policies.values()] for key in first.answers]
    responses = [[text for answers in group for text in answers.responses] for group in groups]
    embedded = rm.embed([group[0].prompt for group in groups], responses)
    contests = []
    for group, found in zip(groups, embedded, strict=True):
        counts = torch.tensor([len(answers.responses) for answers in group])
        lengths = torch.tensor([length for answers in group for length in answers.lengths])
        owner = torch.arange(len(group)).repeat_interleave(counts)
        contests.append(Contest(found.embeddings, found.gate, rm.tau, owner, lengths))
    return contests
