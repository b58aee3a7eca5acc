"""Held-out samples of several policies side by side, for scripts/compare_policies.py.

All policies answer the same prompts; a preference model reads all their responses to a prompt as one row of samples.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from general_preference.alignment.report import Contest
from general_preference.alignment.samples import read_samples, summary_path
from general_preference.datasets.messages import parse_prompt
from general_preference.errors import InputError
from general_preference.files import read_object


@dataclass(frozen=True)
class Policy:
    """A policy as its samples show it. answers: {id of the prompt: row of samples, K >= 2}. settings: of sampling."""

    path: str
    answers: dict[str, dict]
    settings: dict

    def shares(self) -> dict[str, float]:
        """Mean length in tokens, share that did not finish, share that repeats another response to the same prompt."""
        rows = self.answers.values()
        columns = {
            "length_mean": [sum(map(len, row["response_ids"])) / len(row["responses"]) for row in rows],
            "unfinished_share": [1 - sum(row["finished"]) / len(row["finished"]) for row in rows],
            "duplicate_share": [1 - len(set(row["responses"])) / len(row["responses"]) for row in rows],
        }
        return {name: sum(values) / len(values) for name, values in columns.items()}


def read_policy(path: str) -> Policy:
    """A finished file of samples.

    Raises:
        InputError: as `read_samples`; also two prompts with one id, or a prompt with one response.
    """
    path = os.path.expanduser(path)
    rows = read_samples(path)
    answers = {row["id"]: row for row in rows}
    if len(answers) < len(rows):
        raise InputError(f"{path}: its {len(rows)} prompts have {len(answers)} ids, expected each once")
    if alone := next((name for name, row in answers.items() if len(row["responses"]) < 2), None):
        raise InputError(f"{path}: {alone!r} has 1 response, expected at least 2: sample more to each prompt")
    return Policy(path, answers, read_object(summary_path(Path(path)))["settings"])


def check_same_prompts(policies: dict[str, Policy]) -> None:
    """InputError unless all policies answer the prompts of the first, compared by id, text and template options."""
    (first, start), *others = policies.items()
    for name, other in others:
        if different := sorted(start.answers.keys() ^ other.answers.keys()):
            one, lacks = different[0], name if different[0] in start.answers else first
            raise InputError(
                f"{start.path} and {other.path} are of other prompts: {lacks} has no {one!r} ({len(different)} differ)"
            )
        for key, row in start.answers.items():
            if _prompt(other.answers[key]) != _prompt(row):
                raise InputError(f"{start.path} and {other.path} have other prompts under the id {key!r}")


def _prompt(row: dict) -> tuple[list, dict]:
    return parse_prompt(row["prompt"], row["id"]), row.get("options", {})


def rows_of_all(policies: dict[str, Policy]) -> list[dict]:
    """A row of samples for each prompt, in the order of the first policy: the responses of all policies, in theirs."""
    first, *_ = policies.values()
    groups = [[policy.answers[key] for policy in policies.values()] for key in first.answers]
    columns = ("responses", "response_ids", "finished")
    return [group[0] | {name: [one for row in group for one in row[name]] for name in columns} for group in groups]


def make_contests(policies: dict[str, Policy], rows: list[dict], scores: list[dict], tau: float) -> list[Contest]:
    """A `Contest` for each of `rows_of_all`, from its row of scores."""
    contests = []
    for row, scored in zip(rows, scores, strict=True):
        counts = torch.tensor([len(policy.answers[row["id"]]["responses"]) for policy in policies.values()])
        owner = torch.arange(len(policies)).repeat_interleave(counts)
        gate = None if scored["gate"] is None else torch.tensor(scored["gate"])
        lengths = torch.tensor(list(map(len, row["response_ids"])))
        contests.append(Contest(torch.tensor(scored["embeddings"]), gate, tau, owner, lengths))
    return contests
