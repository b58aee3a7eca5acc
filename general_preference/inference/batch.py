"""A trained model over a table of comparisons: one JSON line each, resumable, and what the lines add up to.

Called by eval/ (a user's files) and rewardbench_eval/ (benchmarks).
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from general_preference.datasets.sources import Source
from general_preference.datasets.tokenization import stable_hash
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.files import lock_folder, replace_lines, replace_text
from general_preference.inference.embedding import EmbeddedPrompt, embed
from general_preference.inference.pipeline import GPMPipeline
from general_preference.inference.ranking import hodge
from general_preference.models import statistics
from general_preference.models.config import checkpoint_identity
from general_preference.models.losses import preference_loss
from general_preference.models.score import preference_probability

logger = logging.getLogger(__name__)

CHUNK_ROWS = 512  # comparisons in memory at a time
ALL = "all"
ASKED = "asked"  # the settings that are kept for people: they may change without changing a row


class ResultStore:
    """The JSON lines of a run, one per comparison and in their order, and the files beside them, named by `beside`.

    Every process appends its rows to a part in the folder OUTPUT.parts, where the settings lie, too; in the end the
    main process merges the parts and the settings go into the summary. A kill costs at most a line per process.
    """

    def __init__(self, output: Path, *beside: str):
        self.output = output
        self.parts = output.with_name(output.name + ".parts")
        self.summary = self.beside(".summary.json")
        self._written = (self.output, *map(self.beside, beside), self.summary)

    def beside(self, ending: str) -> Path:
        """The file that is called like the output (without .jsonl) and ends in `ending`."""
        return self.output.with_name(self.output.name.removesuffix(".jsonl") + ending)

    def refuse_inputs(self, sources: Iterable[Source]) -> None:
        """InputError where the results would be written over the data, or into its folder."""
        written = [path.resolve() for path in (*self._written, self.parts)]
        for source in sources:
            data = Path(source.path).expanduser().resolve()
            if data in written or written[-1] in data.parents or data in written[0].parents:
                raise InputError(f"the results {self.output} would be written over or into the data {source.path}")

    @contextlib.contextmanager
    def open(self, context: DistributedContext, count: int, settings: dict, overwrite: bool) -> Iterator[None]:
        """Hold the output while the rows of `count` comparisons are made. Collective.

        Args:
            settings: from `run_settings`. overwrite: drop what other settings made, instead of refusing to.

        Raises:
            InputError: the results there were made with other settings or by no run, or another run is writing.
        """
        self.count, self.settings = count, json.loads(json.dumps(settings))
        claim = context.main_process_first(lambda: self._claim(overwrite), main_only=True)
        self._part = (self.parts / f"part-{context.rank}.jsonl").open("a", encoding="utf-8", buffering=1)
        try:
            yield
        finally:
            self._part.close()
            if claim is not None:
                claim.close()

    def _claim(self, overwrite: bool):
        found = _read_object(self.parts / "settings.json") or _read_object(self.summary).get("settings")
        strange = [path for path in self._written if path.exists()] if not isinstance(found, dict) else []
        if strange:
            raise InputError(f"{strange[0]} is not of a run and would be replaced: remove it, or choose another path")
        difference = _difference(found, self.settings) if found else ""
        if difference and not overwrite:
            raise InputError(f"{self.output} was made with {difference}; choose another path, or set overwrite")
        claim = lock_folder(self.parts, "results")
        parts = list(self.parts.glob("part-*.jsonl"))
        for stale in [*parts, *self._written] if difference else []:  # the summary last: it says whose they are
            stale.unlink(missing_ok=True)
        for part in [] if difference else parts:
            os.truncate(part, part.read_bytes().rfind(b"\n") + 1)  # drops the line that a kill cut short
        replace_text(self.parts / "settings.json", json.dumps(self.settings, indent=2))
        return claim

    def finished(self) -> set[int]:
        """Indices whose rows are on disk."""
        return set(range(self.count)) if self.output.exists() else set(self._read_parts())

    def append(self, index: int, row: dict) -> None:
        """Put one finished row on disk."""
        self._part.write(f"{index}\t{_to_line(row)}\n")

    def merge(self) -> None:
        """Parts -> the output, in order. On the main process, when all are done."""
        if not self.output.exists():
            lines = self._read_parts()
            if len(lines) != self.count:
                raise RuntimeError(f"{self.count - len(lines)} of {self.count} rows are missing: run this again")
            replace_lines(self.output, (lines[index] for index in range(self.count)))

    def _read_parts(self) -> dict[int, str]:
        parts = (part.read_text(encoding="utf-8").split("\n")[:-1] for part in sorted(self.parts.glob("part-*.jsonl")))
        pairs = (line.split("\t", 1) for lines in parts for line in lines)
        return {int(index): row for index, row in pairs}

    def rows(self) -> Iterator[dict]:
        """The rows of the merged output, in order."""
        with self.output.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def replace_rows(self, rows: Iterable[dict]) -> None:
        """Write the merged rows anew, with columns that were found out since. On the main process."""
        replace_lines(self.output, map(_to_line, rows))

    def finish(self, summary: dict) -> None:
        """Write the summary beside the output and remove the parts. On the main process."""
        replace_text(self.summary, json.dumps({"settings": self.settings} | summary, indent=2))
        for path in [*self.parts.glob("part-*.jsonl"), self.parts / "settings.json", self.parts / ".lock"]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something that no run put there
            self.parts.rmdir()


def _to_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _read_object(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _difference(found: dict, settings: dict) -> str:
    """What differs, with both values; nothing if only what is kept for people does."""
    before, now = ({name: some[name] for name in some if name != ASKED} for some in (found, settings))
    if before == now:
        return ""
    before, now = before | found.get(ASKED, {}), now | settings[ASKED]
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} = {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def run_settings(rm: GPMPipeline, path: str, asked: dict, **others) -> dict:
    """What every row depends on: `others`, and what the model at `path` is. `asked` is for people.

    Device, attention kernel and batches are not among them: they change a score by rounding alone.
    """
    dtype, files = str(rm.model.dtype).removeprefix("torch."), stable_hash(checkpoint_identity(path))
    return {ASKED: asked, "model_files": files, "max_length": rm.max_length, "dtype": dtype, "tau": rm.tau} | others


def score_table(
    rm: GPMPipeline,
    table: datasets.Dataset,
    store: ResultStore,
    context: DistributedContext,
    make_row: Callable[[dict, EmbeddedPrompt], dict],
    batch_size: int | None = None,
) -> None:
    """Score what has no row in the open `store` yet, shared among the processes, at most `batch_size` in one call.

    Returns when all are done and, on the main process, the output is written.
    """
    finished = context.broadcast(store.finished() if context.is_main else None)
    lengths = table["length"][:]
    remaining = sorted(set(range(len(table))) - finished, key=lambda index: (-lengths[index], index))
    before = f", {len(finished)} done before" if finished else ""
    model = f"{rm.preference.head} D={rm.value_head_dim} on {rm.device}"
    logger.info("%d comparisons%s; %s, %d process(es)", len(table), before, model, context.world_size)
    mine = remaining[context.rank :: context.world_size]
    hidden = not (context.is_main and mine)
    with tqdm(total=len(mine), desc="scoring", unit="cmp", disable=hidden, mininterval=1) as bar:
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


def summarize_rows(rows: Iterable[dict], tau: float) -> tuple[dict[str, dict], list[tuple[float, float, int]]]:
    """({subset: statistics}, "all" last, and `statistics.calibration_bins` of all) of rows that `result_row` made.

    Beside `statistics.preference_statistics`:
        accuracy_low, accuracy_high: 95 % interval of the accuracy, as if preferences were independent
        groups, cyclic_share:        comparisons with K >= 3 responses, and their mean cyclic share
    """
    subsets: dict[str, tuple[list, list, list]] = {}
    for row in rows:
        scores, labels, cyclic = subsets.setdefault(row.get("subset", ""), ([], [], []))
        pair = "preferences" not in row
        scores += [row["score"]] if pair else row["score"]
        labels += [row["label"]] if pair else [label for *_, label in row["preferences"]]
        cyclic += [row["cyclic_share"]] if "cyclic_share" in row else []
    everything = tuple([value for values in kept for value in values] for kept in zip(*subsets.values(), strict=True))
    named = {name: subsets[name] for name in sorted(subsets) if name not in ("", ALL)}
    results, sums = {}, torch.empty(0)
    for name, (scores, labels, cyclic) in [*named.items(), (ALL, everything)]:
        score, label = (torch.tensor(values, dtype=torch.float64) for values in (scores, labels))
        sums = statistics.preference_sums(score, label, preference_loss(score, temperature=tau, label=label), tau)
        row = statistics.preference_statistics(sums)
        row["accuracy_low"], row["accuracy_high"] = statistics.wilson_interval(row["accuracy"], row["n"])
        row |= {"groups": len(cyclic), "cyclic_share": math.fsum(cyclic) / len(cyclic)} if cyclic else {}
        results[name] = row
    return results, statistics.calibration_bins(sums)
