"""Sources -> the tables that training and evaluation read: load, tokenize, split by prompt, blend, summarize.

No prompt is on both sides of a split, whatever the blend; `Summary` counts what was read, cut or left out.
"""

import itertools
import json
import logging
from dataclasses import asdict, dataclass, field

import datasets
import torch

from general_preference.datasets.reading import Reading
from general_preference.datasets.sources import (
    INTEGERS,
    PREFERENCES,
    REMEDY,
    SHOWN,
    TEXT,
    Source,
    SourceSummary,
    load_source,
    record_location,
    warn_of_shared_files,
    whole_messages,
    without_bad_rows,
)
from general_preference.datasets.tokenization import ComparisonTokenizer, stable_hash
from general_preference.errors import InputError

logger = logging.getLogger(__name__)

COUNTS = ("empty", "identical", "prompt_cut", "response_cut", "identical_after_cut", "thoughts_left_out")
_IDS = {"prompt_ids": INTEGERS, "response_ids": datasets.List(INTEGERS)}
_KEYS = {"id": TEXT, "subset": TEXT, "prompt_key": TEXT}
_NUMBERS = {"length": datasets.Value("int32")} | dict.fromkeys(COUNTS, datasets.Value("bool"))
TOKENIZED = datasets.Features(_KEYS | _IDS | PREFERENCES | _NUMBERS)
_ENCODED = datasets.Features(TOKENIZED | {"problem": TEXT})


@dataclass
class Summary:
    """What one prepared set holds: comparisons, preferences, unique tokens, and everything unusual about it.

    left_out: records that did not fit. empty / identical: comparisons with an empty response, with two equal ones.
    prompt_cut / response_cut: comparisons cut to the length limit; identical_after_cut: told apart only beyond it.
    thoughts_left_out: comparisons whose chat template shows no thoughts of earlier turns, and whose prompt has some.
    seen_prompts: comparisons of an evaluation set whose prompt is also trained on. sources: what it was read from.
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
    thoughts_left_out: int = 0
    seen_prompts: int = 0
    sources: list[SourceSummary] = field(default_factory=list)

    def to_json(self) -> str:
        """One JSON object with every count."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        values = {name: getattr(self, name) for name in ("left_out", *COUNTS, "seen_prompts")}
        notes = [f"{value} {name.replace('_', ' ')}" for name, value in values.items() if value]
        text = f"{self.name}: {self.comparisons} comparisons, {self.preferences} preferences, {self.tokens} tokens"
        text += f" (longest {self.longest})" + (f"; {', '.join(notes)}" if notes else "")
        return "\n  ".join([text, *map(str, self.sources)])


def tokenize(
    table: datasets.Dataset,
    encoder: ComparisonTokenizer,
    workers: int = 1,
    name: str = "",
    skip_bad: bool = False,
    remedy: str = REMEDY,
) -> tuple[datasets.Dataset, list[str]]:
    """Tokenize a table with the columns of `sources.ROW`; cached on disk under `encoder.fingerprint()`.

    Returns:
        A table with the columns of `TOKENIZED` (`length` counts unique tokens, the prompt once), and why records were
        left out under `skip_bad`.

    Raises:
        InputError: no prompt token can be made of a record, or the chat template refuses it or leaves something out.
    """
    workers = max(1, min(workers, len(table) // 2000))
    fingerprint = stable_hash(table._fingerprint, encoder.fingerprint())
    options = {"features": _ENCODED, "remove_columns": table.column_names, "fn_kwargs": {"encoder": encoder}}
    options |= {"num_proc": workers if workers > 1 else None, "desc": f"Tokenizing {name}".strip()}
    options |= {"batched": True, "batch_size": 500, "with_indices": True, "new_fingerprint": fingerprint}
    return without_bad_rows(table.map(_encode_rows, **options), name, skip_bad, remedy)


def _encode_rows(rows: dict, indices: list[int], encoder: ComparisonTokenizer) -> dict:
    whole = list(map(whole_messages, rows["prompt"], rows["responses"], rows["extras"]))
    prompts, responses, options = map(list, zip(*whole, strict=True))
    problems = [""] * len(whole)
    try:
        encoded = encoder.encode(prompts, responses, options)
    except InputError:
        encoded = []
        for number, one in enumerate(whole):
            try:
                encoded += encoder.encode(*([part] for part in one))
            except InputError as error:
                problems[number] = f"{record_location(rows['id'][number], indices[number])}: {error}"
                encoded.append({"prompt_ids": [], "response_ids": []} | dict.fromkeys(COUNTS, False))
    repeated = list(map(_repeats, responses))
    repeated_ids = [_repeats(row["response_ids"]) for row in encoded]
    names = ("prompt_ids", "response_ids", "prompt_cut", "response_cut", "thoughts_left_out")
    asked = [[prompt, some] if some else [prompt] for prompt, some in zip(prompts, options, strict=True)]
    return {
        **{name: rows[name] for name in ("id", "subset", "first", "second", "label", "margin")},
        **{name: [row[name] for row in encoded] for name in names},
        "prompt_key": [stable_hash(*parts) for parts in asked],
        "length": [len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in encoded],
        "empty": [any(map(_is_empty, some)) for some in responses],
        "identical": repeated,
        "identical_after_cut": [ids and not text for ids, text in zip(repeated_ids, repeated, strict=True)],
        "problem": problems,
    }


def _is_empty(response: list[dict]) -> bool:
    return all(len(message) == 2 and not message["content"].strip() for message in response)


def _repeats(items: list) -> bool:
    return any(item in items[:index] for index, item in enumerate(items))


def load_tokenized(
    sources: list[Source],
    encoder: ComparisonTokenizer,
    *,
    reading: Reading | None = None,
    skip_bad=False,
    workers: int = 1,
) -> tuple[list[datasets.Dataset], list[SourceSummary]]:
    """Read and tokenize each source; cached on disk. Returns the tables and what was read for each."""
    tables, summaries = [], []
    if len(sources) > 1:
        warn_of_shared_files(sources)
    if sources and encoder.input_format != "released" and (opening := encoder.template.opening()):
        logger.info("left out of prompts: %r, which the chat template writes only where a response begins", opening)
    for source in sources:
        table, summary = load_source(source, reading, skip_bad)
        table, problems = tokenize(table, encoder, workers, source.name, skip_bad=skip_bad)
        summary.records, summary.left_out = len(table), summary.left_out + len(problems)
        summary.reasons = (summary.reasons + problems)[:SHOWN]
        tables.append(table)
        summaries.append(summary)
    return tables, summaries


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
    if len(units) == 1 and train_ratio < 1:
        joined = "have the same prompt" if groups is None else "belong together, by prompt or by group"
        raise InputError(f"all {len(table)} comparisons {joined}, so none can be held out: use train_split_ratio 1")
    chosen, total = [], 0
    for index in order:
        if total + len(units[index]) <= limit:
            chosen.append(units[index])
            total += len(units[index])
    train, held_out = [], []
    for unit in chosen:
        side = train if len(train) + len(unit) / 2 <= train_ratio * total or train_ratio == 1 else held_out
        side.extend(unit)
    if not chosen:
        fewest = min(map(len, units))
        raise InputError(f"max_samples {max_samples}: the {fewest} comparisons of a prompt stay together: raise it")
    if not train:
        raise InputError(f"train_split_ratio {train_ratio} of {total} comparisons leaves none to train on: raise it")
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


def summarize_table(
    name: str, table: datasets.Dataset, sources: list[SourceSummary] = (), trained_prompts: set[str] | None = None
) -> Summary:
    """Count what a prepared table holds; `trained_prompts` are the prompt keys of the training table."""
    columns = table.with_format("numpy")
    lengths = columns["length"][:]
    return Summary(
        name,
        comparisons=len(table),
        preferences=sum(map(len, table["first"][:])),
        tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        left_out=sum(source.left_out for source in sources),
        sources=list(sources),
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
