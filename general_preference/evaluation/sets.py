"""The evaluation sets by name: where each one is, how its rows are read, and how its number is made.

From the hub, or from a folder with copies laid out as there or as on GitHub: FOLDER/owner/repository or
FOLDER/repository. Every row of a set is read before anything is scored.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from general_preference.datasets.readers import read_records, show
from general_preference.datasets.reading import described
from general_preference.datasets.sources import Source, source_records
from general_preference.errors import InputError
from general_preference.evaluation import aggregates, readers
from general_preference.evaluation.aggregates import Aggregate
from general_preference.evaluation.records import Record, with_unique_ids
from general_preference.evaluation.rewardbench import data, scoring
from general_preference.evaluation.rules import BEST, PAIRS, TIED

logger = logging.getLogger(__name__)

TABLE = ("rewardbench", "rewardbench_2", "ppe_preference", "ppe_correctness", "rmb", "rm_bench", "judgebench")
# fmt: off
LANGUAGES = (
    "arb_Arab", "ces_Latn", "deu_Latn", "ell_Grek", "fra_Latn", "heb_Hebr", "hin_Deva", "ind_Latn", "ita_Latn",
    "jpn_Jpan", "kor_Hang", "nld_Latn", "pes_Arab", "pol_Latn", "por_Latn", "ron_Latn", "rus_Cyrl", "spa_Latn",
    "tur_Latn", "ukr_Cyrl", "vie_Latn", "zho_Hans", "zho_Hant",
)
# fmt: on
NOTHING_SCORED = "nothing was scored"


@dataclass(frozen=True)
class Part:
    """A split of a repository, on the hub or (`on_hub` false) on GitHub alone.

    files: patterns of its files besides the hub's usual ones. optional: a copy may lack it, as single languages.
    """

    name: str
    repository: str
    split: str = "train"
    configuration: str = ""
    files: tuple[str, ...] = ()
    on_hub: bool = True
    optional: bool = False

    @property
    def patterns(self) -> list[str]:
        """Of its files in a copy; the first that finds some wins."""
        folder = f"{self.configuration}/" if self.configuration else ""
        shards = [f"{folder}{place}{self.split}-*.parquet" for place in ("data/", "")]
        plain = [f"{folder}{place}{self.split}{end}" for place in ("data/", "") for end in (".jsonl", ".json")]
        return [*shards, *plain, *self.files]

    def find_files(self, folder: Path) -> list[Path]:
        """Its files in a folder of copies; [] if there are none."""
        copy = find_copy(folder, self.repository)
        return next((files for pattern in self.patterns if (files := sorted(copy.glob(pattern)))), []) if copy else []


@dataclass(frozen=True)
class EvaluationSet:
    """title: in tables. source: what it is read from, parts by `read`, or a benchmark by the loader of its own script.

    official: rows of the whole set, None where that is not known. chance: the score of guessing, None where it depends.
    """

    name: str
    title: str
    source: data.Benchmark | tuple[Part, ...]
    aggregate: Aggregate
    read: Callable[[readers.Row], Record | None] | None = None
    official: int | None = None
    chance: float | None = 0.5


@dataclass(frozen=True)
class LoadedSet:
    """The records of a set; left_out: rows that state no decided pair. missing: parts that the copy lacks."""

    set: EvaluationSet
    records: list[Record]
    left_out: int = 0
    missing: tuple[str, ...] = ()


def find_copy(folder: Path, repository: str) -> Path | None:
    """Where a folder of copies has a repository."""
    places = [folder / repository, folder / repository.rpartition("/")[2]]
    return next((place for place in places if place.is_dir()), None)


def load_set(chosen: EvaluationSet, folder: str | None, ignore_columns: tuple[str, ...] = ()) -> LoadedSet:
    """All records of a set, in order.

    Args:
        folder: where copies of the sets are; None reads the hub. ignore_columns: columns with text to be left out.

    Raises:
        InputError: no such set there, or a row that is not as expected, with its place, the set and the reason.
    """
    place = None if folder is None else Path(folder).expanduser()
    if place is not None and not place.is_dir():
        raise InputError(f"there is no folder {show(place)} with copies of the evaluation sets: correct the path")
    if isinstance(chosen.source, data.Benchmark):
        found = _load_benchmark(chosen, place, ignore_columns)
    else:
        found = _load_parts(chosen, place, ignore_columns)
    notes = [f"{len(found.records)} records, {sum(len(record.pairs) for record in found.records)} pairs"]
    notes += [f"left out: {found.left_out} rows without a decided pair"] if found.left_out else []
    notes += [f"not in the copy: {', '.join(found.missing)}"] if found.missing else []
    logger.info("%s: %s", chosen.title, "; ".join(notes))
    return found


def _load_parts(chosen: EvaluationSet, folder: Path | None, ignore_columns: tuple[str, ...]) -> LoadedSet:
    parts = [part for part in chosen.source if folder is None or not part.optional or part.find_files(folder)]
    missing = tuple(part.name for part in chosen.source if part not in parts)
    records, problems, rows = [], [], 0
    for part in parts or chosen.source[:1]:
        for index, (place, value) in enumerate(_rows(part, folder)):
            rows += 1
            try:
                record = chosen.read(_row(chosen, part, value, ignore_columns))
            except InputError as error:
                reason = str(error).removeprefix(f"{place}: ")
                problems.append(f"{chosen.name}, row {index + 1} of {part.name} ({place}): {reason}")
            else:
                records += [record] if record is not None else []
    if problems:
        more = f" ({len(problems)} such rows in all)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}; {NOTHING_SCORED}")
    if not records:
        raise InputError(f"{chosen.name}: none of {rows} rows can be scored: check that it is the right copy")
    return LoadedSet(chosen, with_unique_ids(records), rows - len(records), missing)


def _row(chosen: EvaluationSet, part: Part, value: object, ignore_columns: tuple[str, ...]) -> readers.Row:
    if isinstance(value, InputError):
        raise value
    if not isinstance(value, dict):
        raise InputError(f"it is {described(value)}, expected an object")
    columns = {name: one for name, one in value.items() if one is not None and name not in ignore_columns}
    return readers.Row(chosen.name, part.name, columns)


def _rows(part: Part, folder: Path | None) -> Iterator[tuple[str, object]]:
    """(place, row or the InputError that says why there is none) of a part."""
    if folder is None:
        if not part.on_hub:
            raise InputError(f"{part.repository} is on GitHub alone: clone it, and name the folder around it as data")
        configured = f":{part.configuration}" if part.configuration else ""
        yield from source_records(Source(part.name, f"{part.repository}{configured}@{part.split}"))
        return
    copy = _required_copy(folder, part.repository)
    files = part.find_files(folder)
    if not files:
        raise InputError(f"{show(copy)} holds none of {', '.join(part.patterns)}: lay it out as on the hub")
    for file in files:
        yield from read_records(file)


def _required_copy(folder: Path, repository: str) -> Path:
    if (copy := find_copy(folder, repository)) is None:
        raise InputError(f"{show(folder)} holds no copy of {repository}, expected it in a folder of that name")
    return copy


def _load_benchmark(chosen: EvaluationSet, folder: Path | None, ignore_columns: tuple[str, ...]) -> LoadedSet:
    benchmark = chosen.source
    dataset = None if folder is None else str(_required_copy(folder, benchmark.hub))
    records = []
    for row in data.load_benchmark(benchmark, dataset, allow_empty=True, ignore_columns=ignore_columns):
        if row["extras"]:
            raise InputError(f"{chosen.name}, {row['id']}: its messages hold more than role and content")
        ties = benchmark.best_of_n and row["subset"] == scoring.TIES
        rule = TIED if ties else BEST if benchmark.best_of_n else PAIRS
        pairs = list(zip(row["first"], row["second"], strict=True))
        own = row["prompt"], row["responses"], pairs, rule
        records.append(Record(row["id"], chosen.name, row["subset"], "", *own))
    return LoadedSet(chosen, with_unique_ids(records))


def choose_sets(names: str) -> list[EvaluationSet]:
    """`"all"` or `"rm_bench,rmb"` -> sets; InputError names one that there is not."""
    wanted = list(SETS) if names == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in SETS:
            raise InputError(f"there is no evaluation set {name!r}, expected all or some of {', '.join(SETS)}")
        if wanted.count(name) > 1:
            raise InputError(f"the evaluation set {name!r} is named twice")
    return [SETS[name] for name in wanted]


def _judgebench(split: str) -> tuple[Part, ...]:
    return (Part(split, "ScalerLab/JudgeBench", split, files=(f"data/*response_model={split}*.jsonl",)),)


_PPE_PREFERENCE = (Part("test", "lmarena-ai/PPE-Human-Preference-V1", "test"),)
_PPE_CORRECTNESS = tuple(Part(name, f"lmarena-ai/PPE-{name}-Best-of-K") for name in aggregates.CORRECTNESS)
_RMB_FILES = ("RMB_dataset/*_set/**/*.json", "*_set/**/*.json")
_RMB = (Part("RMB", "Zhou-Zoey/RMB-Reward-Model-Benchmark", files=_RMB_FILES, on_hub=False),)
_RM_BENCH = (Part("train", "THU-KEG/RM-Bench", files=("total_dataset.json", "data/total_dataset.json")),)
_IF_REWARDBENCH = (Part("IF", "thu-coai/IF-RewardBench", files=("data/if_rewardbench.json",), on_hub=False),)
_M_REWARDBENCH = tuple(
    Part(name, "CohereLabsCommunity/multilingual-reward-bench", "test", name, (f"{name}/*.json*",), optional=True)
    for name in LANGUAGES
)

# fmt: off
SETS: dict[str, EvaluationSet] = {one.name: one for one in (
    EvaluationSet("rewardbench", "RewardBench", data.REWARDBENCH_1, aggregates.rewardbench_sections, official=2985),
    EvaluationSet("rewardbench_2", "RewardBench 2", data.REWARDBENCH_2, aggregates.rewardbench_2_mean, official=1865,
                  chance=None),
    EvaluationSet("ppe_preference", "PPE Preference", _PPE_PREFERENCE, aggregates.pooled_accuracy,
                  readers.read_ppe_preference, 16038),
    EvaluationSet("ppe_correctness", "PPE Correctness", _PPE_CORRECTNESS, aggregates.correctness_mean,
                  readers.read_ppe_correctness),
    EvaluationSet("rmb", "RMB", _RMB, aggregates.rmb_mean, readers.read_rmb, None, None),
    EvaluationSet("rm_bench", "RM-Bench", _RM_BENCH, aggregates.rm_bench_mean, readers.read_rm_bench, 1327),
    EvaluationSet("judgebench", "JudgeBench", _judgebench("gpt"), aggregates.judgebench_accuracy,
                  readers.read_judgebench, 350),
    EvaluationSet("judgebench_claude", "JudgeBench (Claude)", _judgebench("claude"), aggregates.judgebench_accuracy,
                  readers.read_judgebench, 270),
    EvaluationSet("m_rewardbench", "M-RewardBench", _M_REWARDBENCH, aggregates.multilingual_mean,
                  readers.read_m_rewardbench),
    EvaluationSet("if_rewardbench", "IF-RewardBench", _IF_REWARDBENCH, aggregates.instruction_types_mean,
                  readers.read_if_rewardbench, 842),
    EvaluationSet("prior_sets", "prior sets", data.PREF_SETS, aggregates.prior_sets_mean,
                  official=sum(scoring.PRIOR_ROWS.values())),
)}
# fmt: on
