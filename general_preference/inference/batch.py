"""A trained model over a table of comparisons: one JSON line each, resumable, and their statistics.

Called by eval/ (a user's files) and rewardbench_eval/ (benchmarks).
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from general_preference.datasets.sources import Source
from general_preference.datasets.tokenization import stable_hash
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.files import check_outputs, lock_folder, read_object, replace_lines, replace_text
from general_preference.inference.embedding import EmbeddedPrompt, embed
from general_preference.inference.pipeline import GPMPipeline
from general_preference.inference.ranking import hodge
from general_preference.models import statistics
from general_preference.models.config import base_chain, checkpoint_identity
from general_preference.models.losses import preference_loss
from general_preference.models.score import preference_probability

logger = logging.getLogger(__name__)

CHUNK_ROWS = 512  # comparisons in memory at a time
ALL, ASKED = "all", "asked"


class ResultStore:
    """The JSON lines of a run, one per comparison and in their order, and the files with the endings `beside`.

    Every process appends rows to a part in OUTPUT.parts, beside the settings; at the end the main process merges the
    parts, and the settings go into the summary. A kill costs at most a line per process.
    """

    def __init__(self, output: Path, *beside: str):
        self.output = output
        self.parts = output.with_name(output.name + ".parts")
        self.summary = self.beside(".summary.json")
        self._written = (self.output, *map(self.beside, beside), self.summary)

    def beside(self, ending: str) -> Path:
        """The output's path with `ending` for .jsonl."""
        return self.output.with_name(self.output.name.removesuffix(".jsonl") + ending)

    def refuse_inputs(self, sources: Iterable[Source], *read: str | None) -> None:
        """InputError if the results would overwrite the data, what else is `read` or a file of no run, or land in a
        folder of data. An adapter that is read counts with its bases."""
        chains = (base_chain(path) if os.path.isdir(path) else [path] for path in read if path)
        outputs = dict.fromkeys((*self._written, self.parts), "the results")
        check_outputs(outputs, itertools.chain(*chains), [source.path for source in sources])
        self._settings_found()

    @contextlib.contextmanager
    def open(self, context: DistributedContext, count: int, settings: dict, overwrite: bool) -> Iterator[None]:
        """Hold the output for rows of `count` comparisons, made with `settings` from `run_settings`. Collective.

        Raises:
            InputError: results of no run are there, or of other settings (unless `overwrite`, which drops them), or
                another run is writing.
        """
        self.count, self.settings = count, json.loads(json.dumps(settings))
        claim = context.main_process_first(lambda: self._claim(overwrite), main_only=True)
        part = self.parts / f"part-{context.rank}.jsonl"
        with claim or contextlib.nullcontext(), part.open("a", encoding="utf-8", buffering=1) as self._part:
            yield

    def _settings_found(self) -> dict | None:
        """The settings of the results that are there; InputError if what is there is of no run."""
        found = read_object(self.parts / "settings.json") or read_object(self.summary).get("settings")
        if isinstance(found, dict) and ASKED in found:
            return found
        if strange := [path for path in (*self._written, *self.parts.glob("part-*.jsonl")) if path.exists()]:
            raise InputError(f"{strange[0]} is not of a run and would be replaced: remove it, or choose another path")
        return None

    def _claim(self, overwrite: bool):
        found = self._settings_found()
        difference = _difference(found, self.settings) if found else ""
        if difference and not overwrite:
            raise InputError(f"{self.output} was made with {difference}; choose another path, or set overwrite")
        claim = lock_folder(self.parts, "results")
        parts = list(self.parts.glob("part-*.jsonl"))
        for path in [*parts, *self._written] if difference else []:  # the summary last: it holds the settings
            path.unlink(missing_ok=True)
        for path in [] if difference else parts:
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # drops the line that a kill cut short
        replace_text(self.parts / "settings.json", json.dumps(self.settings, indent=2))
        return claim

    def finished(self) -> set[int]:
        """Indices whose rows are on disk."""
        return set(range(self.count)) if self.output.exists() else set(self._read_parts())

    def append(self, index: int, row: dict) -> None:
        """Put one finished row on disk."""
        self._part.write(f"{index}\t{_to_line(row)}\n")

    def merge(self) -> None:
        """Parts -> the output, in order. On the main process, once all are done."""
        if not self.output.exists():
            lines = self._read_parts()
            if len(lines) != self.count:
                raise RuntimeError(f"{self.count - len(lines)} of {self.count} rows are missing: run this again")
            replace_lines(self.output, (lines[index] for index in range(self.count)))

    def _read_parts(self) -> dict[int, str]:
        texts = (part.read_text(encoding="utf-8") for part in self.parts.glob("part-*.jsonl"))
        return {int(index): row for text in texts for index, row in re.findall(r"^(\d+)\t(.*)\n", text, re.MULTILINE)}

    def rows(self) -> Iterator[dict]:
        """The rows of the merged output, in order."""
        with self.output.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def replace_rows(self, rows: Iterable[dict]) -> None:
        """Write the merged rows again, with more columns. On the main process."""
        replace_lines(self.output, map(_to_line, rows))

    def finish(self, summary: dict) -> None:
        """Write the summary beside the output and remove the parts. On the main process."""
        replace_text(self.summary, json.dumps({"settings": self.settings} | summary, indent=2))
        for path in [*self.parts.glob("part-*.jsonl"), self.parts / "settings.json", self.parts / ".lock"]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            self.parts.rmdir()


_to_line = partial(json.dumps, ensure_ascii=False, allow_nan=False)


def _difference(found: dict, settings: dict) -> str:
    """The settings that differ, with both values; empty if only those under `ASKED` do."""
    if found | {ASKED: None} == settings | {ASKED: None}:
        return ""
    before, now = (some | some.get(ASKED, {}) | {ASKED: None} for some in (found, settings))
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} = {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def run_settings(rm: GPMPipeline, path: str, asked: dict, **others) -> dict:
    """What every row depends on: the model at `path` and `others`. `asked` is only for messages and the summary.

    Device, attention kernel and batches are left out: they change a score by rounding alone.
    """
    dtype, files = str(rm.model.dtype).removeprefix("torch."), stable_hash(checkpoint_identity(path))
    return {ASKED: asked, "model_files": files, "max_length": rm.max_length, "dtype": dtype, "tau": rm.tau} | others


def score_table(
    rm: GPMPipeline, table, store: ResultStore, context: DistributedContext, make_row: Callable, batch_size: int | None
) -> None:
    """Score what the open `store` lacks, split over the processes, at most `batch_size` a call; then merge.

    make_row: (row of `table`, its EmbeddedPrompt) -> what is written.
    """
    finished = context.broadcast(store.finished() if context.is_main else None)
    lengths = table["length"][:]
    remaining = sorted(set(range(len(table))) - finished, key=lambda index: (-lengths[index], index))
    mine = remaining[context.rank :: context.world_size]
    model = f"{rm.preference.head} D={rm.value_head_dim} on {rm.device}, {context.world_size} process(es)"
    logger.info("%d comparisons, %d done before; %s", len(table), len(finished), model)
    shown = context.is_main and mine
    with tqdm(total=len(mine), desc="scoring", unit="cmp", disable=not shown, mininterval=1) as bar:
        for start in range(0, len(mine), CHUNK_ROWS):
            chunk = mine[start : start + CHUNK_ROWS]
            rows = [table[index] for index in chunk]
            found = embed(rm.model, rows, batch_tokens=rm.batch_tokens, batch_size=batch_size, padding=rm.padding)
            for position, embedded in found:
                store.append(chunk[position], make_row(rows[position], embedded))
                bar.update()
    context.barrier()
    if context.is_main:
        store.merge()


def result_row(comparison: dict, embedded: EmbeddedPrompt, tau: float, save_embeddings: bool = False) -> dict:
    """The output row of one comparison.

    A pair has `score` and `probability` of response 0 (chosen) over response 1 (rejected), and `label`, the stated
    probability. Other comparisons have lists with one entry per stated preference, [preferred, other, label] in
    `preferences`; with K >= 3 responses also `cyclic_share` of their scores.
    """
    scores = embedded.scores()
    row = {"id": comparison["id"]} | ({"subset": comparison["subset"]} if comparison["subset"] else {})
    first, second, label = (comparison[name] for name in ("first", "second", "label"))
    pair = len(scores) == 2 and len(label) == 1
    score = scores[0, 1] if pair else scores[first, second]
    row |= {"score": score.tolist(), "probability": preference_probability(score, tau).tolist()}
    if pair:
        row["label"] = label[0] if first[0] == 0 else 1 - label[0]
    else:
        row["preferences"] = [list(preference) for preference in zip(first, second, label, strict=True)]
    if len(scores) > 2:
        row["cyclic_share"] = hodge(scores).cyclic_share
    if save_embeddings:
        row["embeddings"] = embedded.embeddings.tolist()
        row |= {"gate": embedded.gate.tolist()} if embedded.gate is not None else {}
    return row


def summarize_rows(rows: Iterable[dict], tau: float) -> tuple[dict[str, dict], list[tuple[float, float, int]]]:
    """({subset: statistics}, "all" last, and `statistics.calibration_bins` of all) of rows from `result_row`.

    Beside `statistics.preference_statistics`: accuracy_low and accuracy_high (95 % interval, as if preferences were
    independent), groups (comparisons with K >= 3 responses) and their mean cyclic_share.
    """
    subsets: dict[str, tuple[list, list, list]] = {}
    for row in rows:
        scores, labels, cyclic = subsets.setdefault(row.get("subset", ""), ([], [], []))
        pair = "preferences" not in row
        scores += [row["score"]] if pair else row["score"]
        labels += [row["label"]] if pair else [label for *_, label in row["preferences"]]
        cyclic += [row["cyclic_share"]] if "cyclic_share" in row else []
    results, everything = {}, [list(itertools.chain(*kept)) for kept in zip(*subsets.values(), strict=True)]
    for name in [*sorted(subsets.keys() - {"", ALL}), ALL]:
        scores, labels, cyclic = everything if name == ALL else subsets[name]
        score, label = (torch.tensor(values, dtype=torch.float64) for values in (scores, labels))
        sums = statistics.preference_sums(score, label, preference_loss(score, temperature=tau, label=label), tau)
        row = statistics.preference_statistics(sums)
        row["accuracy_low"], row["accuracy_high"] = statistics.wilson_interval(row["accuracy"], row["n"])
        row |= {"groups": len(cyclic), "cyclic_share": math.fsum(cyclic) / len(cyclic)} if cyclic else {}
        results[name] = row
    return results, statistics.calibration_bins(sums)
