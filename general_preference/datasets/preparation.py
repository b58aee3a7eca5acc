"""Sources -> the tables that training and evaluation read: load, tokenize, split by prompt, blend, summarize.

No prompt is on both sides of a split, whatever the blend; `Summary` counts what was read, cut or left out.
"""

import itertools
import json
from dataclasses import asdict, dataclass

import datasets
import torch

from general_preference.datasets.sources import (
    INTEGERS,
    PREFERENCES,
    TEXT,
    Source,
    load_source,
    record_location,
    warn_of_shared_files,
)
from general_preference.datasets.tokenization import ComparisonTokenizer, stable_hash
from general_preference.errors import InputError

COUNTS = ("empty", "identical", "prompt_cut", "response_cut", "identical_after_cut")
_IDS = {"prompt_ids": INTEGERS, "response_ids": datasets.List(INTEGERS)}
_KEYS = {"id": TEXT, "subset": TEXT, "prompt_key": TEXT}
_NUMBERS = {"length": datasets.Value("int32")} | dict.fromkeys(COUNTS, datasets.Value("bool"))
TOKENIZED = datasets.Features(_KEYS | _IDS | PREFERENCES | _NUMBERS)


@dataclass
class Summary:
    """What one prepared set holds: comparisons, preferences, unique tokens, and everything unusual about it.

    left_out: records that did not fit. empty / identical: comparisons with an empty response, with two equal ones.
    prompt_cut / response_cut: comparisons cut to the length limit; identical_after_cut: told apart only beyond it.
    seen_prompts: comparisons of an evaluation set whose prompt is also trained on.
    """

    name: str
    comparisons: int
    preferences: int
    tokens: int
    longest: int
    left_out: int = 0
    empty: int = 0
    identical: int = 0
    prompt_cut: int = 0
    response_cut: int = 0
    identical_after_cut: int = 0
    seen_prompts: int = 0

    def to_json(self) -> str:
        """One JSON object with every count."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        values = {name: getattr(self, name) for name in ("left_out", *COUNTS, "seen_prompts")}
        notes = [f"{value} {name.replace('_', ' ')}" for name, value in values.items() if value]
        text = f"{self.name}: {self.comparisons} comparisons, {self.preferences} preferences, {self.tokens} tokens"
        return f"{text} (longest {self.longest})" + (f"; {', '.join(notes)}" if notes else "")


def tokenize(table: datasets.Dataset, encoder: ComparisonTokenizer, workers: int = 1, name: str = ""):
    """Tokenize a table with the columns of `sources.ROW`; cached on disk under `encoder.fingerprint()`.

    Returns a table with the columns of `TOKENIZED`; `length` counts unique tokens (the prompt once).

    Raises:
        InputError: no prompt token can be made of a record, or the chat template refuses it.
    """
    workers = max(1, min(workers, len(table) // 2000))
    fingerprint = stable_hash(table._fingerprint, encoder.fingerprint())
    options = {"features": TOKENIZED, "remove_columns": table.column_names, "fn_kwargs": {"encoder": encoder}}
    options |= {"num_proc": workers if workers > 1 else None, "desc": f"Tokenizing {name}".strip()}
    options |= {"batched": True, "batch_size": 500, "with_indices": True, "new_fingerprint": fingerprint}
    return table.map(_encode_rows, **options)


def _encode_rows(rows: dict, indices: list[int], encoder: ComparisonTokenizer) -> dict:
    places = [record_location(name, index) for index, name in zip(indices, rows["id"], strict=True)]
    try:
        encoded = encoder.encode(rows["prompt"], rows["responses"])
    except InputError:
        for place, prompt, responses in zip(places, rows["prompt"], rows["responses"], strict=True):
            try:
                encoder.encode([prompt], [responses])
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
        raise
    for place, row in zip(places, encoded, strict=True):
        if not row["prompt_ids"]:
            raise InputError(f"{place}: the prompt has no tokens; expected some text before the responses")
    contents = [[[message["content"] for message in response] for response in some] for some in rows["responses"]]
    repeated = list(map(_repeats, contents))
    repeated_ids = [_repeats(row["response_ids"]) for row in encoded]
    return {
        **{name: rows[name] for name in ("id", "subset", "first", "second", "label", "margin")},
        **{name: [row[name] for row in encoded] for name in encoded[0]},
        "prompt_key": [stable_hash(prompt) for prompt in rows["prompt"]],
        "length": [len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in encoded],
        "empty": [any(not "".join(response).strip() for response in some) for some in contents],
        "identical": repeated,
        "identical_after_cut": [ids and not text for ids, text in zip(repeated_ids, repeated, strict=True)],
    }


def _repeats(items: list) -> bool:
    return any(item in items[:index] for index, item in enumerate(items))


def load_tokenized(
    sources: list[Source], encoder: ComparisonTokenizer, *, custom=False, skip_bad=False, workers: int = 1
) -> tuple[list[datasets.Dataset], dict[str, int]]:
    """Read and tokenize each source; cached on disk. Returns the tables and the records left out of each."""
    tables, left_out = [], {}
    if len(sources) > 1:
        warn_of_shared_files(sources)
    for source in sources:
        table, left_out[source.name] = load_source(source, custom, skip_bad)
        tables.append(tokenize(table, encoder, workers, source.name))
    return tables, left_out


def blend(tables: list[datasets.Dataset], probabilities: list[float], seed: int) -> datasets.Dataset:
    """One table from several, drawn by probability until every set was seen whole."""
    if any(len(table) == 0 for table in tables):
        raise InputError("dataset_probs: a set has no comparison left to train on: raise max_samples or drop the set")
    return datasets.interleave_datasets(tables, probabilities, seed=seed, stopping_strategy="all_exhausted")


def split_and_blend(
    tables: list, probabilities: list[float] | None, train_ratio: float, *, seed: int, max_samples=None, group_size=1
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training table, held-out table): split all sets by prompt together, then blend what is trained on.

    So the held-out table repeats nothing. With `group_size` > 1 the tables get a column `group`: neighbors that must
    stay together.
    """
    whole = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    groups = None
    if group_size > 1:
        groups, start = [], 0
        for table in tables:
            groups += [start + row // group_size for row in range(len(table))]
            start += -(-len(table) // group_size)
        whole = whole.add_column("group", groups)
    train, held_out = split_by_prompt(whole, train_ratio, seed=seed, max_samples=max_samples, groups=groups)
    if probabilities is None or len(tables) == 1:
        return whole.select(train), whole.select(held_out)
    parts, start = [], 0
    for table in tables:
        parts.append(whole.select([index for index in train if start <= index < start + len(table)]))
        start += len(table)
    return blend(parts, probabilities, seed), whole.select(held_out)


def parse_probabilities(text: str | None, count: int) -> list[float] | None:
    """`"0.4,0.6"` -> [0.4, 0.6], normalized to sum 1; None for none. InputError if they do not match `count` sets."""
    if text is None:
        return None
    try:
        values = [float(part) for part in str(text).split(",")]
    except ValueError as error:
        raise InputError(f"dataset_probs {text} is not a list of numbers such as 0.4,0.6") from error
    if len(values) != count:
        raise InputError(f"dataset_probs has {len(values)} numbers, but dataset has {count} sets: give one for each")
    if any(not value > 0 for value in values) or sum(values) == float("inf"):
        raise InputError(f"dataset_probs {text}: every probability must be positive")
    return [value / sum(values) for value in values]


def split_by_prompt(
    table: datasets.Dataset, train_ratio: float, *, seed: int, max_samples=None, groups: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Row indices (train, held out), shuffled and split so that no prompt is on both sides.

    train_ratio: share in (0, 1] of the comparisons to train on. max_samples: use at most so many in all. Both are met
    as closely as whole prompts allow. groups: an id in [0, rows) per row; rows of one group stay together on one side.
    """
    units = _units(table["prompt_key"][:], groups)  # without [:] a column is read row by row
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist()
    limit = len(table) if max_samples is None else min(max_samples, len(table))
    chosen, total = [], 0
    for index in order:
        if total + len(units[index]) <= limit:
            chosen.append(units[index])
            total += len(units[index])
    train, held_out = [], []
    for unit in chosen:
        side = train if len(train) + len(unit) / 2 <= train_ratio * total or train_ratio == 1 else held_out
        side.extend(unit)
    if not train:
        limits = f"max_samples {max_samples}, train_split_ratio {train_ratio}"
        raise InputError(f"no comparison is left to train on ({limits})")
    return train, held_out


def _units(prompt_keys: list[str], groups: list[int] | None) -> list[list[int]]:
    """Row indices that must stay together: groups, joined where they share a prompt."""
    from scipy.sparse import coo_array, csgraph  # only here: the import is slow

    known = {key: number for number, key in enumerate(dict.fromkeys(prompt_keys))}
    prompts, count = [known[key] for key in prompt_keys], len(prompt_keys)
    others = [count + group for group in (range(count) if groups is None else groups)]
    edges = coo_array(([True] * count, (prompts, others)), shape=(2 * count, 2 * count))
    _, parts = csgraph.connected_components(edges, directed=False)
    units: dict[int, list[int]] = {}
    for index, part in enumerate(parts[prompts].tolist()):
        units.setdefault(part, []).append(index)
    return list(units.values())


def summarize_table(name: str, table: datasets.Dataset, left_out=0, trained_prompts: set[str] | None = None) -> Summary:
    """Count what a prepared table holds; `trained_prompts` are the prompt keys of the training table."""
    columns = table.with_format("numpy")
    lengths = columns["length"][:]
    return Summary(
        name,
        comparisons=len(table),
        preferences=sum(map(len, table["first"][:])),
        tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        left_out=left_out,
        **{count: int(columns[count][:].sum()) for count in COUNTS},
        seen_prompts=sum(key in (trained_prompts or ()) for key in table["prompt_key"][:]),
    )


def check_known_ids(table: datasets.Dataset, vocabulary: int, tokenizer) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        table: with the columns of `TOKENIZED`. vocabulary: how many ids the model knows, from 0.

    Raises:
        InputError: names the token and the first record that has it.
    """
    columns = table.select_columns(["id", "prompt_ids", "response_ids"]).with_format("arrow")
    for number, part in enumerate(columns.iter(1000)):
        prompts, responses = (part[name].combine_chunks() for name in ("prompt_ids", "response_ids"))
        flat = prompts.flatten().to_numpy(), responses.flatten().flatten().to_numpy()
        if max((int(ids.max()) for ids in flat if len(ids)), default=0) < vocabulary:
            continue
        for index, row in enumerate(part.to_pylist(), 1000 * number):
            ids = itertools.chain(row["prompt_ids"], *row["response_ids"])
            if unknown := next((token for token in ids if token >= vocabulary), None):
                what = f"token {unknown} ({tokenizer.convert_ids_to_tokens(unknown)!r})"
                cure = "resize the model's embeddings to its tokenizer, or use the tokenizer it was trained with"
                place = record_location(row["id"], index)
                raise InputError(f"{place} has {what}, but the model has {vocabulary} embeddings: {cure}")
