#!/usr/bin/env python3
"""Run a preference model over your own comparisons: a score for each, a summary, a picture.

    python eval/batch_inference_rm_general_preference.py --pretrain MODEL --dataset FILE --output_path results.jsonl
    python scripts/launch.py --nproc-per-node 8 eval/batch_inference_rm_general_preference.py ...   on 8 devices

Writes OUTPUT (one JSON line per comparison, in the order of the data), OUTPUT's name with .summary.json (accuracy with
its 95 % interval, loss, calibration, per subset) and .reliability.png. Started again after a stop, it continues where
it was. Exit codes, each with one line that says why: 1 the run failed (a score is not finite, the disk is full), 2 what
was given cannot be used, 130 interrupted.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cli import restart_with_cpu_settings

    restart_with_cpu_settings()

import datasets
import torch

from general_preference import GPMPipeline
from general_preference.cli import exit_code, flag, format_table, parse_flags, quiet_other_libraries
from general_preference.datasets.preparation import Summary, load_tokenized, parse_probabilities, summarize_table
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import stable_hash
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.inference.arguments import ModelArguments, check_positive
from general_preference.inference.batch import ASKED, ResultStore, ResultSummary, result_row, score_remaining
from general_preference.inference.pictures import draw_reliability
from general_preference.models.config import checkpoint_identity

logger = logging.getLogger("batch_inference")

PICTURE = ".reliability.png"


@dataclass
class BatchArguments:
    """Model, comparisons, and where the results go. The paper's flags keep their names and meaning."""

    pretrain: str | None = flag(None, "trained preference model: folder or hub name")
    dataset: str | None = flag(
        None, "comparisons: files (json, jsonl, csv, parquet), folders or hub names, separated by commas"
    )
    output_path: str = flag("./results.jsonl", "file of the results, one JSON object a line")
    dataset_probs: str | None = flag(
        None, "share of each set, as in 0.4,0.6: sets alternate so, each comparison once; default end to end"
    )
    max_samples: int = flag(
        1000000, "score at most so many comparisons: drawn by --seed, or the first with --dataset_probs"
    )
    seed: int = flag(42, "seed of the draw of --max_samples")
    is_custom_dataset: bool = flag(False, "require the custom format: instruction, chosen, reject")
    on_bad_record: str = flag(
        "stop", "a record that does not fit: stop the run, or skip and count it", choices=["stop", "skip"]
    )
    max_len: int | None = flag(
        None, "tokens of prompt and one response together; default what the model was trained with"
    )
    disable_fast_tokenizer: bool = flag(False, "use the slow (Python) tokenizer where a model has both")
    micro_batch_size: int | None = flag(None, "comparisons in one call at most; default as many as --batch_tokens hold")
    save_embeddings: bool = flag(False, "also write each response's embedding and each prompt's gate")
    overwrite: bool = flag(False, "replace results of another model, other data or other settings in --output_path")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        for name in ("pretrain", "dataset"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing")
        check_positive(self, "max_samples", "micro_batch_size")
        if Path(self.output_path).is_dir():
            raise InputError(f"--output_path {self.output_path} is a folder: name a file in it")


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    arguments, model = parse_flags(
        (BatchArguments, ModelArguments), argv, "Score comparisons with a preference model. Every flag: --help."
    )
    return exit_code(lambda: run(arguments, model), kept="finished rows are kept: the same command continues")


def run(arguments: BatchArguments, model: ModelArguments) -> None:
    """From paths to results."""
    arguments.check()
    model.check()
    refuse_own_input(arguments)
    quiet_other_libraries()
    with DistributedContext.join() as processes:
        options = {"max_length": arguments.max_len, "disable_fast_tokenizer": arguments.disable_fast_tokenizer}
        rm = processes.main_process_first(lambda: model.load(arguments.pretrain, processes.local_rank, **options))
        table, read = processes.main_process_first(lambda: load_table(arguments, rm, model.preprocessing_workers))
        for one in read:
            logger.info("%s", one)
        store = result_store(arguments.output_path, len(table), processes.rank)
        made_with = processes.main_process_first(lambda: settings(arguments, rm, table))
        processes.main_process_first(lambda: store.claim(made_with, arguments.overwrite), main_only=True)
        try:
            make_row = partial(result_row, tau=rm.tau, save_embeddings=arguments.save_embeddings)
            score_remaining(rm, table, store, processes, make_row, arguments.micro_batch_size)
            if processes.is_main:
                report(rm, store, read)
        finally:
            store.close()


def refuse_own_input(arguments: BatchArguments) -> None:
    """InputError where a result would be written over, or into, the data."""
    written = result_store(arguments.output_path, 0, 0)
    for source in parse_sources(arguments.dataset):
        if written.touches(Path(source.path)):
            raise InputError(f"--output_path {arguments.output_path} would write over or into --dataset {source.path}")


def result_store(output_path: str, count: int, rank: int) -> ResultStore:
    """Where the rows go; a picture is drawn beside them."""
    return ResultStore(Path(output_path), count, rank, flag="--output_path", beside=(PICTURE,))


def load_table(arguments: BatchArguments, rm: GPMPipeline, workers: int) -> tuple[datasets.Dataset, list[Summary]]:
    """(tokenized comparisons in the order of the results, what each set held). Without subsets, sets are subsets."""
    sources = parse_sources(arguments.dataset)
    probabilities = parse_probabilities(arguments.dataset_probs, len(sources))
    tables, left_out = load_tokenized(
        sources,
        rm.encoder,
        custom=arguments.is_custom_dataset,
        skip_bad=arguments.on_bad_record == "skip",
        workers=workers,
    )
    read = [
        summarize_table(source.name, table, left_out[source.name])
        for source, table in zip(sources, tables, strict=True)
    ]
    if len(tables) > 1:
        for number, (source, table) in enumerate(zip(sources, tables, strict=True)):
            subsets = [subset or source.name for subset in table["subset"][:]]
            tables[number] = table.remove_columns("subset").add_column("subset", subsets)
    whole = datasets.concatenate_datasets(tables)
    order = _order([len(table) for table in tables], probabilities, arguments.max_samples, arguments.seed)
    return whole.select(order), read


def _order(sizes: list[int], probabilities: list[float] | None, limit: int, seed: int) -> list[int]:
    """Row indices of the concatenated sets: each at most once, alternating by `probabilities`, at most `limit`."""
    total = sum(sizes)
    if probabilities is None:
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
        return drawn.sort().values.tolist() if limit < total else list(range(total))
    # The k-th row of a set is due at (k + 1) / probability: every beginning of the order has the shares asked for.
    due = [(k + 1) / share for size, share in zip(sizes, probabilities, strict=True) for k in range(size)]
    return sorted(range(total), key=lambda index: (due[index], index))[:limit]


def settings(arguments: BatchArguments, rm: GPMPipeline, table: datasets.Dataset) -> dict:
    """What every result row depends on: rows made with other settings are never mixed with these."""
    names = ("pretrain", "dataset", "dataset_probs", "max_samples", "seed")
    return {
        ASKED: {name: getattr(arguments, name) for name in names},
        "save_embeddings": arguments.save_embeddings,
        "max_len": rm.max_length,
        "tau": rm.tau,
        "dtype": str(rm.model.dtype).removeprefix("torch."),
        "model_files": stable_hash(checkpoint_identity(arguments.pretrain)),
        "comparisons": table._fingerprint,  # follows the files' sizes and times, the tokenizer, and the draw
    }


def report(rm: GPMPipeline, store: ResultStore, read: list[Summary]) -> None:
    """Sum the rows up, draw, print."""
    summary = ResultSummary(rm.tau).add(store.rows())
    results = summary.results()
    data = [asdict(one) for one in read]
    store.finish({"preference": asdict(rm.preference), "data": data, "results": results})
    picture = store.beside(PICTURE)
    drawn = draw_reliability(summary.reliability(), results, picture)
    shown = results if len(results) > 2 else {"all": results["all"]}
    print(f"\n{format_table(shown)}\n\nResults: {store.output}\nSummary: {store.summary}")
    if drawn:
        print(f"Picture: {picture}")


if __name__ == "__main__":
    sys.exit(main())
