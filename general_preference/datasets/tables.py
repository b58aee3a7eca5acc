"""Comparisons as Arrow tables: tokenised once with `datasets.map`, cached on disk, read row by row.

Apart from `tokenization.py`, so that scoring a few texts in a notebook needs neither `datasets` nor a cache.
"""

import datasets

from general_preference.datasets.records import Message
from general_preference.datasets.sources import place_of
from general_preference.datasets.tokenization import ComparisonTokenizer, stable_hash
from general_preference.errors import InputError

COUNTS = ("empty", "identical", "prompt_cut", "response_cut", "identical_after_cut")
TOKENIZED = datasets.Features(
    {
        "id": datasets.Value("string"),
        "subset": datasets.Value("string"),
        "prompt_key": datasets.Value("string"),
        "prompt_ids": datasets.List(datasets.Value("int32")),
        "response_ids": datasets.List(datasets.List(datasets.Value("int32"))),
        "first": datasets.List(datasets.Value("int32")),
        "second": datasets.List(datasets.Value("int32")),
        "label": datasets.List(datasets.Value("float64")),
        "margin": datasets.Value("float64"),
        "length": datasets.Value("int32"),
        **{name: datasets.Value("bool") for name in COUNTS},
    }
)


def tokenize(
    table: datasets.Dataset, encoder: ComparisonTokenizer, workers: int = 1, name: str = ""
) -> datasets.Dataset:
    """Tokenise a table of comparisons with `datasets.map`; the result is cached on disk under `encoder.fingerprint()`.

    Args:
        table: columns of `sources.ROW`. workers: processes, fewer when there is little to do.

    Returns:
        a table with the columns of `TOKENIZED`; `length` counts unique tokens (the prompt once).

    Raises:
        InputError: no prompt token can be made of a record, or the chat template refuses it.
    """
    workers = max(1, min(workers, len(table) // 2000))
    fingerprint = stable_hash(table._fingerprint, encoder.fingerprint())
    return table.map(
        _encode_rows,
        batched=True,
        with_indices=True,
        batch_size=500,
        num_proc=workers if workers > 1 else None,
        fn_kwargs={"encoder": encoder},
        features=TOKENIZED,
        remove_columns=table.column_names,
        new_fingerprint=fingerprint,
        desc=f"Tokenising {name}".strip(),
    )


def _encode_rows(rows: dict, indices: list[int], encoder: ComparisonTokenizer) -> dict:
    places = [place_of(name, index) for index, name in zip(indices, rows["id"], strict=True)]
    try:
        encoded = encoder.encode(rows["prompt"], rows["responses"])
    except InputError:
        encoded = [_encode_one(encoder, *row) for row in zip(places, rows["prompt"], rows["responses"], strict=True)]
    for place, row in zip(places, encoded, strict=True):
        if not row["prompt_ids"]:
            raise InputError(f"{place}: the prompt has no tokens; expected some text before the responses")
    contents = [[[message["content"] for message in response] for response in some] for some in rows["responses"]]
    return {
        **{name: rows[name] for name in ("id", "subset", "first", "second", "label", "margin")},
        **{
            name: [row[name] for row in encoded]
            for name in ("prompt_ids", "response_ids", "prompt_cut", "response_cut")
        },
        "prompt_key": [stable_hash(prompt) for prompt in rows["prompt"]],
        "length": [len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in encoded],
        "empty": [any(not "".join(response).strip() for response in some) for some in contents],
        "identical": [_repeats(some) for some in contents],
        "identical_after_cut": [
            _repeats(row["response_ids"]) and not _repeats(some) for row, some in zip(encoded, contents, strict=True)
        ],
    }


def _encode_one(
    encoder: ComparisonTokenizer, place: str, prompt: list[Message], responses: list[list[Message]]
) -> dict:
    try:
        return encoder.encode([prompt], [responses])[0]
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _repeats(items: list) -> bool:
    return any(item in items[:index] for index, item in enumerate(items))
