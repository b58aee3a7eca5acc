"""Scores of the records of a set: by a model, K responses behind one copy of their prompt, or from a file.

A line of the results is {"id", "scores"}: K numbers of a model with one number per response, else the (K, K) matrix of
its pairs, row over column. A file of such lines can be summed up again without the model.
"""

import logging
from pathlib import Path

import datasets
import numpy as np

from general_preference.datasets.preparation import Summary, check_known_ids, summarize_table, tokenize
from general_preference.datasets.readers import file_format, read_records
from general_preference.datasets.reading import described
from general_preference.datasets.tokenization import stable_hash
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.evaluation.records import record_table
from general_preference.evaluation.rewardbench.data import content_fingerprint
from general_preference.evaluation.rules import score_matrix
from general_preference.evaluation.sets import NOTHING_SCORED, LoadedSet
from general_preference.inference.batch import ASKED, ResultStore, run_settings, score_table
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.pipeline import GPMPipeline

logger = logging.getLogger(__name__)

COLUMNS = {"id", "scores", "set"}  # of a line of scores
_ROUNDING = 1e-5  # by which a matrix may miss being antisymmetric, as a part of its largest score


def prepare_rows(
    rm: GPMPipeline, rows: datasets.Dataset, title: str, workers: int, context: DistributedContext
) -> tuple[datasets.Dataset, Summary]:
    """(tokenized rows, what they hold), once it is sure that the model can score them. Collective.

    Raises:
        InputError: no token can be made of a row, the model has no embedding for one, or all responses are cut alike.
    """
    options = {"workers": workers, "name": title, "remedy": NOTHING_SCORED}
    table, _ = context.main_process_first(lambda: tokenize(rows, rm.encoder, **options))
    logger.info("%s", read := summarize_table(title, table))
    check_known_ids(table, rm.model.vocabulary_size, rm.tokenizer)
    if read.identical_after_cut and read.identical + read.identical_after_cut == len(table):
        raise InputError("every row has responses with the same tokens: raise max_length or fix the template")
    return table, read


def record_scores(comparison: dict, embedded: EmbeddedPrompt) -> dict:
    """What is written about a record."""
    scalar = embedded.embeddings.shape[1] == 1
    scores = embedded.embeddings[:, 0] if scalar else embedded.scores()
    return {"id": comparison["id"], "scores": scores.tolist()}


def model_rows(rm: GPMPipeline, path: str, loaded: LoadedSet, workers: int, context) -> tuple:
    """(tokenized records, what they hold, settings that every score depends on) of a model. Collective."""
    rows = record_table(loaded.records)
    table, read = prepare_rows(rm, rows, loaded.set.title, workers, context)
    hashes = {"tokens": rm.encoder.fingerprint(), "data": content_fingerprint(rows), "set": loaded.set.name}
    return table, read, run_settings(rm, path, {"model": path}, **hashes)


def write_model_scores(
    rm: GPMPipeline, table: datasets.Dataset, store: ResultStore, context: DistributedContext, batch_size: int
) -> None:
    """Score the records that the open `store` lacks. Collective."""
    score_table(rm, table, store, context, record_scores, batch_size)


def file_settings(path: str, loaded: LoadedSet, scores: list[list], tau: float) -> dict:
    """As `run_settings`, of scores from a file."""
    data = content_fingerprint(record_table(loaded.records))
    hashes = {"scores_in_file": stable_hash(scores), "data": data}
    return {ASKED: {"scores": path}, **hashes, "set": loaded.set.name, "tau": tau}


def write_file_scores(loaded: LoadedSet, scores: list[list], store: ResultStore) -> None:
    """Put scores from a file into the open `store`."""
    done = store.finished()
    for index, (record, found) in enumerate(zip(loaded.records, scores, strict=True)):
        if index not in done:
            store.append(index, {"id": record.id, "scores": found})
    store.merge()


def read_score_file(path: str, sets: list[LoadedSet], ignore_columns: tuple[str, ...] = ()) -> list[list[list]]:
    """The scores of each record of each set, from a file with a line {"id", "scores"} per record.

    A file for several sets also has "set", the name of one, in each line; of other columns only `ignore_columns` may
    be there.

    Raises:
        InputError: a line that is no such object, of no record or of one that was there before, or a record without
            a line; with the line or the record.
    """
    if file_format(path) not in (".jsonl", ".ndjson", ".json"):
        raise InputError(f"{path} is no file of JSON lines by its name: call it .jsonl, or .jsonl.gz")
    known = {loaded.set.name: {record.id: len(record.responses) for record in loaded.records} for loaded in sets}
    found: dict[str, dict[str, list]] = {name: {} for name in known}
    for place, row in read_records(Path(path)):
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, dict) or not {"id", "scores"} <= row.keys():
            raise InputError(f"{place} is no object with id and scores: {described(row)}")
        if unread := row.keys() - COLUMNS - set(ignore_columns):
            raise InputError(f"{place}: nothing reads the column {min(unread)!r}: name it in ignore_columns")
        name, record = row.get("set") or (next(iter(known)) if len(known) == 1 else None), str(row["id"])
        if name not in list(known):
            raise InputError(f"{place}: its set is {name!r}, expected one of {', '.join(known)}")
        if record not in known[name] or record in found[name]:
            what = "was scored in a line before" if record in found[name] else f"is none of {name}"
            raise InputError(f"{place}: record {record!r} {what}")
        found[name][record] = _checked(row["scores"], known[name][record], f"{place}: record {record!r}")
    for name, records in known.items():
        if lacking := [record for record in records if record not in found[name]]:
            raise InputError(f"{path} lacks scores of {len(lacking)} records of {name}, the first {lacking[0]!r}")
    return [[found[loaded.set.name][record.id] for record in loaded.records] for loaded in sets]


def _checked(scores: object, count: int, place: str) -> list:
    """K numbers or an antisymmetric (K, K) matrix of them."""
    expected = f"expected {count} numbers, or {count} rows of {count} with scores[i][j] = -scores[j][i]"
    try:
        values = np.asarray(scores)
    except ValueError:  # rows of different lengths
        values = np.empty(0)
    fits = values.dtype.kind in "iuf" and values.shape in ((count,), (count, count))
    if fits:
        with np.errstate(over="ignore", invalid="ignore"):  # what they say is a sum of squares of their differences
            fits = np.isfinite(np.square(score_matrix(values)).sum())
    if fits and values.ndim == 2:
        fits = np.abs(values + values.T).max() <= _ROUNDING * max(1.0, np.abs(values).max())
    if not fits:
        raise InputError(f"{place} has scores {described(scores)}, {expected}")
    return values.astype(np.float64).tolist()
