"""The files between the stages of policy alignment: one JSON object a line, FILE.summary.json with settings beside it.

    samples  {"id": str, "prompt": str | [messages], "prompt_ids": [int], "responses": [str, K],
              "response_ids": [[int], K], "finished": [bool, K]}          optional "options": of the chat template
    scored   {"id": str, "embeddings": [[D], K], "gate": [P] | null}      optional "cut": true, if not all was read

`response_ids` are the policy's tokens, with its stop token at the end exactly if the response is finished.
"""

import json
from array import array
from pathlib import Path

import xxhash

from general_preference.datasets.readers import read_records
from general_preference.errors import InputError
from general_preference.files import read_object

SAMPLE_COLUMNS = ("id", "prompt", "prompt_ids", "responses", "response_ids", "finished")
SCORE_COLUMNS = ("id", "embeddings", "gate")
_LISTS = {"prompt_ids", "responses", "response_ids", "finished", "embeddings"}


def summary_path(path: Path) -> Path:
    """Where the settings of a file of samples or scores are."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".summary.json")


def read_samples(path: str | Path) -> list[dict]:
    """The samples that `generate_responses` wrote, in their order.

    Raises:
        InputError: no such file, one that is not finished, or a row that is none of samples, by its line.
    """
    rows, _ = _read(Path(path), "samples", SAMPLE_COLUMNS, ("options",))
    for place, row in rows:
        counts = {name: len(row[name]) for name in ("responses", "response_ids", "finished")}
        if len(set(counts.values())) > 1:
            raise InputError(f"{place}: the columns disagree about the number of responses: {counts}")
        if not row["responses"]:
            raise InputError(f"{place}: it has no response, expected at least one")
        if not row["prompt_ids"]:
            raise InputError(f"{place}: prompt_ids is empty, expected the prompt's tokens")
        for name, kind in (("responses", str), ("response_ids", list), ("finished", bool)):
            if not all(isinstance(one, kind) for one in row[name]):
                raise InputError(f"{place}: {name} is no list of {kind.__name__}")
        for ids in (row["prompt_ids"], *row["response_ids"]):
            _check_ids(place, ids)
    return [row for _, row in rows]


def _check_ids(place: str, ids: list) -> None:
    try:
        array("I", ids)
    except (TypeError, OverflowError) as error:
        wrong = next(one for one in ids if not isinstance(one, int) or not 0 <= one < 2**32)
        raise InputError(f"{place}: found the token {wrong!r}, expected whole numbers from 0") from error


def read_scores(path: str | Path) -> tuple[list[dict], dict]:
    """(the rows that `score_responses` wrote, in their order; their summary).

    Raises:
        InputError: as `read_samples`; also embeddings or a gate of another size than the summary states.
    """
    rows, summary = _read(Path(path), "scores", SCORE_COLUMNS, ("cut",))
    dim, planes = summary["settings"].get("dim"), summary["settings"].get("planes")
    for place, row in rows:
        if not row["embeddings"]:
            raise InputError(f"{place}: it has no embedding, expected one for each response")
        if sizes := {len(one) for one in row["embeddings"]} - {dim}:
            raise InputError(f"{place}: an embedding has {sizes.pop()} numbers, but its summary says D = {dim}")
        if row["gate"] is not None and len(row["gate"]) != planes:
            raise InputError(f"{place}: the gate has {len(row['gate'])} weights, but its summary says {planes} planes")
    return [row for _, row in rows], summary


def samples_checksum(samples: list[dict]) -> str:
    """XXH3 of ids, texts and tokens of samples, in their order."""
    digest = xxhash.xxh3_128()
    for row in samples:
        digest.update(json.dumps([row[name] for name in ("id", "prompt", "responses", "finished")]).encode())
        for ids in (row["prompt_ids"], *row["response_ids"]):
            digest.update(array("q", [len(ids), *ids]))
    return digest.hexdigest()


def scores_checksum(rows: list[dict]) -> str:
    """XXH3 of the embeddings and gates of rows, in their order."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(json.dumps([row["embeddings"], row["gate"]]).encode())
    return digest.hexdigest()


def join(samples: list[dict], scores: tuple[list[dict], dict]) -> list[dict]:
    """Each row of `read_samples` with the `embeddings` and `gate` that `read_scores` has for it, in the samples' order.

    Raises:
        InputError: the scores are of other samples: by checksum, by id, or by the number of responses.
    """
    rows, summary = scores
    by_id = {row["id"]: row for row in rows}
    if len(by_id) < len(rows):
        raise InputError(f"{len(rows)} scored prompts have {len(by_id)} ids: make ids unique, then score again")
    if missing := next((row["id"] for row in samples if row["id"] not in by_id), None):
        raise InputError(f"the scores have no row with the id {missing!r}, which the samples have: score these samples")
    if len(rows) != len(samples):
        raise InputError(f"there are {len(rows)} scored prompts, but {len(samples)} of samples: score these samples")
    for row in samples:
        count, scored = len(row["responses"]), len(by_id[row["id"]]["embeddings"])
        if count != scored:
            raise InputError(f"{row['id']} has {count} responses, but {scored} were scored: score these samples")
    if samples_checksum(samples) != summary["settings"].get("samples"):
        raise InputError("the scores are of other samples with the same ids (their checksums differ): score these")
    return [row | {name: by_id[row["id"]][name] for name in ("embeddings", "gate")} for row in samples]


def _read(path: Path, kind: str, columns: tuple[str, ...], optional: tuple[str, ...]) -> tuple[list, dict]:
    """([(place, row)], summary) of a finished file whose rows have these columns."""
    if path.is_dir() or path.suffix != ".jsonl":
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'no .jsonl file'}, expected a file of {kind}")
    if path.with_name(path.name + ".parts").is_dir():
        raise InputError(f"{path} is not finished: run what makes the {kind} again, it continues")
    if not path.is_file():
        raise InputError(f"{path} does not exist: make the {kind} first")
    summary = read_object(summary_path(path))
    if not isinstance(summary.get("settings"), dict):
        raise InputError(f"{path} has no {summary_path(path).name} beside it, which says what the {kind} are of")
    rows = []
    for place, row in read_records(path):
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, dict) or not set(columns) <= row.keys() <= {*columns, *optional}:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{place}: found {found}, expected {kind} with {', '.join(columns)}")
        if not isinstance(row["id"], str):
            raise InputError(f"{place}: its id is {row['id']!r}, expected text")
        if wrong := [name for name in columns if name in _LISTS and not isinstance(row[name], list)]:
            raise InputError(f"{place}: {wrong[0]} is not a list, expected {kind} with {', '.join(columns)}")
        rows.append((place, row))
    if not rows:
        raise InputError(f"{path} is empty, expected {kind}")
    return rows, summary
