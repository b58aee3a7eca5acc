"""A model over a table of comparisons: one result row each, and what the rows add up to.

What a user's file (eval/) and a benchmark (rewardbench_eval/) have in common.
"""

import logging
import math
from collections.abc import Callable, Iterable

import datasets
import torch
from tqdm import tqdm

from general_preference.inference.embedding import EmbeddedPrompt, embed
from general_preference.inference.pipeline import GPMPipeline
from general_preference.inference.ranking import hodge
from general_preference.inference.results import ResultStore
from general_preference.models.losses import preference_loss
from general_preference.models.score import preference_probability
from general_preference.models.statistics import (
    calibration_bins,
    preference_statistics,
    preference_sums,
    wilson_interval,
)
from general_preference.processes import Processes

logger = logging.getLogger(__name__)

WINDOW = 512  # comparisons in memory at a time
ALL = "all"


MakeRow = Callable[[dict, EmbeddedPrompt], dict]  # (tokenised comparison, its embeddings) -> result row


def score_remaining(
    rm: GPMPipeline,
    table: datasets.Dataset,
    store: ResultStore,
    processes: Processes,
    make_row: MakeRow,
    batch_size: int | None = None,
) -> None:
    """Score what has no row in `store` yet, shared among the processes; then the main one writes the whole output.

    Returns on every process when all are done.
    """
    finished = processes.from_main(store.finished() if processes.is_main else None)
    lengths = table["length"][:]
    remaining = [index for index in range(len(table)) if index not in finished]
    remaining.sort(key=lambda index: (-lengths[index], index))
    logger.info(
        "%d comparisons%s; %s D=%d on %s, %d process(es)",
        len(table), f", {len(finished)} done before" if finished else "",
        rm.preference.head, rm.value_head_dim, rm.device, processes.world_size,
    )  # fmt: skip
    mine = remaining[processes.rank :: processes.world_size]
    score_table(rm, table, mine, store, make_row, batch_size=batch_size, progress=processes.is_main)
    processes.barrier()
    if processes.is_main:
        store.merge()


def score_table(
    rm: GPMPipeline,
    table: datasets.Dataset,
    indices: list[int],
    store: ResultStore,
    make_row: MakeRow,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> None:
    """Score the comparisons `indices` of a tokenised table and put each row on disk as soon as it is done.

    Comes out `WINDOW` at a time, in the order given; `batch_size` bounds the comparisons of a call.
    """
    with tqdm(total=len(indices), desc="scoring", unit="cmp", disable=not (progress and indices), mininterval=1) as bar:
        for start in range(0, len(indices), WINDOW):
            window = indices[start : start + WINDOW]
            rows = [table[index] for index in window]
            found = embed(rm.model, rows, batch_tokens=rm.batch_tokens, batch_size=batch_size, padding=rm.padding)
            for position, embedded in found:
                store.append(window[position], make_row(rows[position], embedded))
                bar.update()


def result_row(comparison: dict, embedded: EmbeddedPrompt, tau: float, save_embeddings: bool = False) -> dict:
    """What is written about one comparison.

    A pair gives `score` and `probability` of response 0 (chosen) over response 1 (rejected), and `label`, the stated
    probability of that. A comparison with more responses or preferences gives lists, one entry per stated preference,
    each [preferred, other, label] in `preferences`; with K >= 3 responses also `cyclic_share` of their scores.
    """
    scores = embedded.scores()
    row = {"id": comparison["id"]} | ({"subset": comparison["subset"]} if comparison["subset"] else {})
    stated = list(zip(comparison["first"], comparison["second"], comparison["label"], strict=True))
    if len(scores) == 2 and len(stated) == 1:
        first, _, label = stated[0]
        score = scores[0, 1]
        row |= {"score": score.item(), "probability": preference_probability(score, tau).item()}
        row["label"] = label if first == 0 else 1 - label
    else:
        chosen = torch.stack([scores[first, second] for first, second, _ in stated])
        row |= {"score": chosen.tolist(), "probability": preference_probability(chosen, tau).tolist()}
        row["preferences"] = [list(preference) for preference in stated]
        if len(scores) > 2:
            row["cyclic_share"] = hodge(scores).cyclic_share
    if save_embeddings:
        row["embeddings"] = embedded.embeddings.tolist()
        row |= {"gate": embedded.gate.tolist()} if embedded.gate is not None else {}
    return row


class ResultSummary:
    """Statistics of result rows: over all of them and over each subset."""

    def __init__(self, tau: float):
        self.tau = tau
        self.scores: dict[str, list[float]] = {}
        self.labels: dict[str, list[float]] = {}
        self.cyclic: dict[str, list[float]] = {}

    def add(self, rows: Iterable[dict]) -> "ResultSummary":
        """Take in rows that `result_row` made."""
        for row in rows:
            subset, pair = row.get("subset", ""), "preferences" not in row
            labels = [row["label"]] if pair else [label for *_, label in row["preferences"]]
            self.scores.setdefault(subset, []).extend([row["score"]] if pair else row["score"])
            self.labels.setdefault(subset, []).extend(labels)
            if "cyclic_share" in row:
                self.cyclic.setdefault(subset, []).append(row["cyclic_share"])
        return self

    def results(self) -> dict[str, dict]:
        """{subset: statistics}, "all" last: those of `statistics.preference_statistics`, and

        accuracy_low, accuracy_high: 95 % interval of the accuracy, as if preferences were independent
        groups, cyclic_share:        comparisons with three responses or more, and the mean share of their squared
                                     scores that no ranking can explain
        """
        results = {}
        for name in [*sorted(self.scores.keys() - {""}), ALL]:
            row = preference_statistics(self._sums(name))
            row["accuracy_low"], row["accuracy_high"] = wilson_interval(row["accuracy"], row["n"])
            cyclic = self._of(self.cyclic, name)
            row |= {"groups": len(cyclic), "cyclic_share": math.fsum(cyclic) / len(cyclic)} if cyclic else {}
            results[name] = row
        return results

    def reliability(self) -> list[tuple[float, float, int]]:
        """Bins of the reliability diagram over all rows, see `statistics.calibration_bins`."""
        return calibration_bins(self._sums(ALL))

    def _sums(self, name: str) -> torch.Tensor:
        score, label = (torch.tensor(self._of(kept, name), dtype=torch.float64) for kept in (self.scores, self.labels))
        return preference_sums(score, label, preference_loss(score, temperature=self.tau, label=label), self.tau)

    def _of(self, kept: dict[str, list[float]], name: str) -> list[float]:
        return [value for values in kept.values() for value in values] if name == ALL else kept.get(name, [])
